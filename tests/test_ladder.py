"""The memory ladder: every rung of docs/memory.md is really in force, read from modules and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import Trainer

from runner.manifest import Job
from runner.train import methods, state
from runner.train.facts import weight_bytes
from runner.train.models import adapter
from runner.train.models import model as models
from tests.attempts import JOB, merged, planned, run, steps

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def job_with(**changes: Any) -> Job:
    return Job.model_validate(merged(JOB, changes))


def base_of(job: Job) -> Any:
    from runner.demo import resolve_model

    return models.load_base(job, str(resolve_model(job.model.name_or_path)))


def text_linears(base: Any, kind: type) -> list[Any]:
    return [module for name, module in base.named_modules() if isinstance(module, kind) and "text" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_have_the_dtype(dtype: str) -> None:
    base = base_of(job_with(model={"dtype": dtype}))
    assert {parameter.dtype for parameter in base.parameters()} == {getattr(torch, dtype)}


def test_each_step_down_in_bits_is_smaller() -> None:
    sizes = [
        weight_bytes(base_of(job_with(**changes)))
        for changes in (
            {"model": {"dtype": "float32", "freeze": []}},
            {"model": {"dtype": "bfloat16", "freeze": []}},
            {"model": {"dtype": "bfloat16", "freeze": []}, "quantization": {"load_in_8bit": True}},
            {"model": {"dtype": "bfloat16", "freeze": []}, "quantization": NF4},
            {
                "model": {"dtype": "bfloat16", "freeze": []},
                "quantization": {**NF4, "bnb_4bit_use_double_quant": True},
            },
        )
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_a_four_bit_weight_has_its_scales(double: bool, bits: float) -> None:
    """64 weights share a float32 scale; doubly quantized a byte, and 256 of those a float32."""
    linear = Linear4bit(1024, 1024, bias=False, quant_type="nf4", compress_statistics=double).to("cpu")
    assert weight_bytes(linear) * 8 / 1024**2 == pytest.approx(bits, abs=0.001)


def test_adapters_are_no_weights_of_the_base() -> None:
    job = job_with(lora={"use_dora": True})
    base = base_of(job)
    before = weight_bytes(base)
    assert weight_bytes(adapter.adapted(base, job, None)) == before


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_as_the_job_says(kind: str, double: bool) -> None:
    options = {**NF4, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    base = base_of(job_with(quantization={**options, "bnb_4bit_compute_dtype": "bfloat16"}))
    linears = text_linears(base, Linear4bit)
    assert linears
    for linear in linears:
        assert linear.weight.quant_state.quant_type == kind
        assert linear.weight.quant_state.nested is double
        assert linear.compute_dtype == torch.bfloat16


def test_eight_bits() -> None:
    linears = text_linears(base_of(job_with(quantization={"load_in_8bit": True})), Linear8bitLt)
    assert linears and all(linear.weight.dtype == torch.int8 for linear in linears)


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_the_kind_of_adapter(lora: dict[str, bool]) -> None:
    job = job_with(lora={"r": 4, "lora_alpha": 8, **lora})
    layers = [m for m in adapter.adapted(base_of(job), job, None).modules() if isinstance(m, LoraLayer)]
    assert layers
    for layer in layers:
        assert layer.scaling["default"] == (8 / 4**0.5 if lora.get("use_rslora") else 8 / 4)
        assert ("default" in layer.lora_magnitude_vector) is bool(lora.get("use_dora"))


@pytest.mark.parametrize(
    ("optim", "name", "paged"),
    [
        ("adamw_bnb_8bit", "AdamW", False),
        ("paged_adamw_8bit", "AdamW", True),
        ("adamw_torch_fused", "AdamW", None),
    ],
)
def test_the_optimizer(tmp_path: Path, optim: str, name: str, paged: bool | None) -> None:
    plan = planned(tmp_path, {"training": {"optim": optim}})
    kind, options = Trainer.get_optimizer_cls_and_kwargs(methods.arguments(plan, 1))
    assert kind.__name__ == name
    assert bool(options.get("is_paged")) is bool(paged)
    assert options.get("optim_bits") == (None if paged is None else 8)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimizer_state_is_eight_bits_where_tensors_are_large(tmp_path: Path, optim: str) -> None:
    """bitsandbytes keeps tensors below 4,096 elements in 32 bits."""
    changes = {"lora": {"r": 64}, "training": {"optim": optim, "max_steps": 1}}
    outcome, _ = run(tmp_path, changes)
    assert outcome["outcome"] == "done"
    (saved,) = (tmp_path / "outbox").iterdir()
    parameters, moments = load_file(saved / state.PARAMETERS), load_file(saved / state.OPTIMIZER)
    first = {key: value for key, value in moments.items() if key.endswith("/state1")}
    dtypes = {name: next(v.dtype for key, v in first.items() if key.startswith(name)) for name in parameters}
    large = {name for name, value in parameters.items() if value.numel() >= 4096}
    assert large and {dtypes[name] for name in large} == {torch.uint8}
    assert {dtypes[name] for name in set(parameters) - large} <= {torch.float32}


def test_accumulation_checkpointing_and_frozen_parts(tmp_path: Path) -> None:
    """One attempt with all three: what the trainer recorded of itself."""
    training = {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "max_steps": 1}
    outcome, events = run(tmp_path, {"training": training})
    assert outcome["facts"]["geometry"] == {
        "global_batch_size": 8,
        "per_device": 2,
        "accumulation": 4,
        "world": 1,
    }
    assert outcome["facts"]["gradient_checkpointing"] is True
    assert outcome["facts"]["optimizer"] == "AdamW"
    assert len(steps(events)[0]["ids"]) == 8
    for part in ("vision_tower", "projector"):
        assert not any(outcome["facts"]["parts"][part].values())


def test_smaller_images_are_fewer_tokens(tmp_path: Path) -> None:
    """`model.processor` reaches the processor: two tiles a side against one."""
    found = []
    for edge in (128, 256):
        processor = {
            "size": {"longest_edge": edge},
            "max_image_size": {"longest_edge": 128},
            "do_image_splitting": True,
        }
        changes = {"model": {"processor": processor}, "training": {"max_steps": 1}}
        _, events = run(tmp_path / str(edge), changes)
        found.append(steps(events)[0]["tokens"])
    assert found[1] > 2 * found[0]
