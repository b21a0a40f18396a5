"""Frozen means frozen, quantized means quantized: counted on the modules of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.utils import is_torchvision_available

from runner.demo import resolve_model
from runner.errors import DataError, JobError
from runner.manifest import Job
from runner.train.models import model as models
from runner.train.models.architectures import parts

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder() -> str:
    return str(resolve_model("demo:smolvlm-tiny"))


def job(**changes: Any) -> Job:
    return Job.model_validate(
        {
            "name": "test",
            "method": "sft",
            "model": {"name_or_path": "demo:smolvlm-tiny", "dtype": "float32"},
            "quantization": FOUR_BIT,
            "lora": LORA,
            "datasets": {"train": [{"path": "demo:charts", "format": "vqa"}]},
            "training": {},
            **changes,
        }
    )


def watch_backward(part: torch.nn.Module, calls: list[str]) -> None:
    """Note the class of every layer of a part in which a backward pass arrives."""
    for module in part.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            module.register_full_backward_hook(lambda module, *_: calls.append(type(module).__name__))


def batch(model: torch.nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    """One image and one question as the model takes them, with labels."""
    from PIL import Image

    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many bars?"}]}]
    )
    inputs = processor(text=[text], images=[[Image.new("RGB", (64, 64), "red")]], return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"].clone()}


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [(FOUR_BIT, Linear4bit), ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, Linear4bit),
     ({"load_in_8bit": True}, Linear8bitLt)],
)  # fmt: skip
def test_only_the_language_model_is_quantized_and_adapted(
    folder: str, quantization: dict[str, Any], kind: type[torch.nn.Module]
) -> None:
    it = job(quantization=quantization)
    model = models.add_adapter(models.load_base(it, folder), it)
    quantized = [name for name, module in model.named_modules() if isinstance(module, kind)]
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert quantized
    assert adapted
    assert all(".text_model." in name for name in quantized + adapted)
    counted = models.describe(model)["parts"]
    for part in ("vision_tower", "projector"):
        assert counted[part] == {"linear4bit": 0, "linear8bit": 0, "adapted": 0, "trainable": 0}
    assert counted["language_model"]["adapted"] == len(adapted)
    assert counted["language_model"]["linear4bit"] + counted["language_model"]["linear8bit"] == len(quantized)


def test_a_frozen_tower_and_projector_receive_no_backward_call(folder: str) -> None:
    it = job()
    model = models.add_adapter(models.load_base(it, folder), it)
    model.train()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    calls: list[str] = []
    where = parts("idefics3")
    base = model.get_base_model()
    for path in where.of(["vision_tower", "projector"]):
        watch_backward(base.get_submodule(path), calls)
    model(**batch(model, models.load_processor(it, folder))).loss.backward()
    assert calls == []
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_backward_hook_of_that_test_fires_when_the_tower_trains(folder: str) -> None:
    it = job(model={"name_or_path": "demo:smolvlm-tiny", "dtype": "float32", "freeze": []}, quantization=None)
    model = models.add_adapter(models.load_base(it, folder), it)
    counted = models.describe(model)["parts"]
    assert counted["vision_tower"]["adapted"] > 0
    assert counted["projector"]["adapted"] > 0
    calls: list[str] = []
    (path,) = parts("idefics3").vision_tower
    tower = model.get_base_model().get_submodule(path)
    watch_backward(tower, calls)
    model.enable_input_require_grads()
    model(**batch(model, models.load_processor(it, folder))).loss.backward()
    assert {"Linear", "LayerNorm"} <= set(calls)


def test_a_frozen_projector_does_not_cut_off_a_tower_that_trains(folder: str) -> None:
    it = job(model={"name_or_path": "x", "dtype": "float32", "freeze": ["projector"]}, quantization=None)
    model = models.add_adapter(models.load_base(it, folder), it)
    model(**batch(model, models.load_processor(it, folder))).loss.backward()
    tower = [p for name, p in model.named_parameters() if p.requires_grad and "vision_model" in name]
    assert tower
    assert all(p.grad is not None for p in tower)
    assert models.describe(model)["parts"]["projector"]["adapted"] == 0


def test_trained_biases_stay_out_of_frozen_parts(folder: str) -> None:
    it = job(lora={**LORA, "bias": "all"})
    model = models.add_adapter(models.load_base(it, folder), it)
    models.check_frozen(model, ["vision_tower", "projector"])


def test_freezing_changes_no_number(folder: str) -> None:
    frozen, free = (
        models.load_base(
            job(quantization=None, model={"name_or_path": "x", "dtype": "float32", "freeze": freeze}), folder
        )
        for freeze in (["vision_tower", "projector"], [])
    )
    inputs = batch(frozen, models.load_processor(job(), folder))
    with torch.no_grad():
        assert torch.equal(frozen(**inputs).logits, free(**inputs).logits)


@pytest.mark.parametrize("lora", [{**LORA, "use_dora": True}, {**LORA, "use_rslora": True}, LORA])
def test_adapters_are_float32_over_a_quantized_base(folder: str, lora: dict[str, Any]) -> None:
    it = job(lora=lora)
    model = models.add_adapter(models.load_base(it, folder), it)
    models.float32_trainable(model)
    assert models.describe(model)["trainable_dtypes"] == ["float32"]


def test_without_an_adapter_all_but_the_frozen_parts_train(folder: str) -> None:
    model = models.load_base(job(quantization=None, lora=None), folder)
    counted = models.describe(model)["parts"]
    assert counted["vision_tower"]["trainable"] == counted["projector"]["trainable"] == 0
    assert counted["language_model"]["trainable"] > 0


def test_a_given_skip_list_is_added_to_what_is_frozen(folder: str) -> None:
    it = job(quantization={**FOUR_BIT, "llm_int8_skip_modules": ["model.text_model.layers.0"]})
    model = models.load_base(it, folder)
    quantized = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert quantized
    assert not any(
        name.startswith(("model.text_model.layers.0.", "model.vision", "lm_head")) for name in quantized
    )
    models.check_frozen(model, ["vision_tower", "projector"])


def test_a_frozen_part_that_is_not_is_found_on_the_model(folder: str) -> None:
    model = models.load_base(job(quantization=None), folder)
    (path,) = parts("idefics3").projector
    model.get_submodule(path).requires_grad_(True)
    with pytest.raises(JobError, match="projector"):
        models.check_frozen(model, ["vision_tower", "projector"])


def test_the_jobs_own_exclusions_hold_beside_the_frozen_parts(folder: str) -> None:
    it = job(lora={**LORA, "exclude_modules": ["down_proj"]})
    model = models.add_adapter(models.load_base(it, folder), it)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert adapted
    assert not any("down_proj" in name or "vision_model" in name for name in adapted)


def test_an_adapter_that_matches_nothing_is_refused(folder: str) -> None:
    it = job(lora={**LORA, "target_modules": ["nothing_proj"]})
    with pytest.raises(JobError, match="nothing_proj"):
        models.add_adapter(models.load_base(it, folder), it)


def test_a_folder_without_a_model_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="configuration"):
        models.load_config(str(tmp_path))
    with pytest.raises(DataError, match="processor"):
        models.load_processor(job(), str(tmp_path))


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is here, so it is not missing")
def test_a_missing_image_back_end_is_refused_not_replaced(folder: str) -> None:
    it = job(model={"name_or_path": "x", "image_backend": "torchvision"})
    with pytest.raises(DataError, match="image_backend"):
        models.load_processor(it, folder)
