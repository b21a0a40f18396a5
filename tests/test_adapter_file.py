"""An adapter out of a checkpoint, without torch: the files that the export of the same moment leaves."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from runner.checkpoint.adapter_file import CONFIG, PARAMETERS, WEIGHTS, extract, saved_name
from runner.demo import resolve_model
from runner.errors import DataError, UsageError
from runner.manifest import Job
from runner.train import gathering, state
from runner.train.models import model as models
from tests.attempts import JOB, merged, run

LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "a bias of B": {"lora_bias": True, "target_modules": ["fc1", "fc2"]},
    "biases of what is adapted": {"bias": "lora_only"},
    "a module to save": {"modules_to_save": ["lm_head"]},
    "a module to save that has modules": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "an embedding under dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "parameters": {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
}
"""Whatever gives an adapter other parameters, on every part of the model."""


def job(lora: dict[str, Any], freeze: list[str]) -> Job:
    return Job.model_validate(merged(JOB, {"lora": lora, "model": {"freeze": freeze}}))


def base(of: Job) -> PreTrainedModel:
    return models.load_base(of, str(resolve_model("demo:smolvlm-tiny")))


def adapted(of: Job) -> PeftModel:
    """A model with an adapter whose every value is another."""
    model = models.add_adapter(base(of), of)
    models.float32_trainable(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gathering.trainable(model).values():
            parameter.copy_(torch.randn_like(parameter))
    return model


def saved(folder: Path, model: PeftModel) -> Path:
    """What of a checkpoint `extract` reads, as the trainer saves it."""
    folder.mkdir()
    save_file(
        {name: value.detach() for name, value in gathering.trainable(model).items()}, folder / PARAMETERS
    )
    state.save_adapter_config(folder, model)
    return folder


# PEFT (0.21.2) takes the bias of a lora_B, which has one dimension, for a shard.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape")
@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_it_is_what_peft_saves_byte_for_byte(tmp_path: Path, lora: dict[str, Any]) -> None:
    wanted = job(lora, freeze=[])
    model = adapted(wanted)
    extract(saved(tmp_path / "checkpoint", model), tmp_path / "adapter")
    model.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    mine, theirs = (tmp_path / name / WEIGHTS for name in ("adapter", "peft"))
    assert set(load_file(mine)) == set(load_file(theirs))
    assert mine.read_bytes() == theirs.read_bytes()
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("adapter", "peft")]
    for config in configs:
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
    assert configs[0] == configs[1]
    loaded = models.load_adapter(base(wanted), tmp_path / "adapter")
    for name, value in gathering.trainable(model).items():
        assert torch.equal(loaded.get_parameter(name), value), name


def test_a_value_that_never_trains_is_the_base_models(tmp_path: Path) -> None:
    """PEFT saves the biases of a frozen tower with `bias: all`; a checkpoint has only what trains."""
    wanted = job({"bias": "all"}, ["vision_tower", "projector"])
    model = adapted(wanted)
    extract(saved(tmp_path / "checkpoint", model), tmp_path / "adapter")
    loaded = models.load_adapter(base(wanted), tmp_path / "adapter").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]},
    ],
    ids=["plain", "dora and more"],
)
def test_the_last_checkpoint_of_a_run_holds_its_adapter(tmp_path: Path, lora: dict[str, Any]) -> None:
    """A 4-bit base in bfloat16, and the trainer's own process."""
    changes = {
        "model": {"dtype": "bfloat16"},
        "quantization": {"load_in_4bit": True},
        "lora": lora,
        "training": {"per_device_train_batch_size": 8, "max_steps": 2},
        "checkpoints": {"save_steps": 1},
    }
    outcome, _ = run(tmp_path, changes)
    assert outcome["outcome"] == "done", outcome["error"]
    first, last = sorted((tmp_path / "outbox").iterdir())
    for checkpoint in (first, last):
        assert CONFIG in json.loads((checkpoint / "checkpoint.json").read_text())["files"]
        extract(checkpoint, tmp_path / "out" / checkpoint.name)
    exported = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / last.name).iterdir()} == exported
    assert (tmp_path / "out" / first.name / CONFIG).read_bytes() == exported[CONFIG]
    assert (tmp_path / "out" / first.name / WEIGHTS).read_bytes() != exported[WEIGHTS]


@pytest.mark.parametrize(
    ("name", "saved_as"),
    [
        ("m.q_proj.lora_A.default.weight", "m.q_proj.lora_A.weight"),
        ("m.q_proj.lora_B.default.bias", "m.q_proj.lora_B.bias"),
        ("m.q_proj.lora_magnitude_vector.default.weight", "m.q_proj.lora_magnitude_vector"),
        ("m.embed_tokens.lora_embedding_A.default", "m.embed_tokens.lora_embedding_A"),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("m.mlp.modules_to_save.default.up_proj.weight", "m.mlp.up_proj.weight"),
        ("e.token_adapter.trainable_tokens_delta.default", "e.token_adapter.trainable_tokens_delta"),
        ("m.q_proj.base_layer.bias", "m.q_proj.base_layer.bias"),
        ("m.default.q_proj.lora_A.default.weight", "m.default.q_proj.lora_A.weight"),
    ],
)
def test_name_table(name: str, saved_as: str) -> None:
    assert saved_name(name) == saved_as


def test_it_reads_no_more_than_pieces(tmp_path: Path) -> None:
    """64 MiB of parameters."""
    (tmp_path / CONFIG).write_text("{}")
    value = torch.zeros(1 << 24)
    save_file({"m.lora_A.default.weight": value}, tmp_path / PARAMETERS)
    tracemalloc.start()
    extract(tmp_path, tmp_path / "adapter")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 << 20
    assert torch.equal(load_file(tmp_path / "adapter" / WEIGHTS)["m.lora_A.weight"], value)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "the whole model trains; remedy: .* runs/<name>/model"),
        ('{"velora_config": {"num_groups": 4}}', "velora_config .* remedy: .* runs/<name>/adapter"),
        ('{"ensure_weight_tying": true, "modules_to_save": ["embed_tokens"]}', "ensure_weight_tying"),
        ("{", "is not JSON"),
    ],
)
def test_what_has_no_whole_adapter_is_refused(tmp_path: Path, config: str | None, why: str) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / PARAMETERS)
    if config is not None:
        (tmp_path / CONFIG).write_text(config)
    with pytest.raises(DataError, match=why):
        extract(tmp_path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("keep", "why"), [(4, "no safetensors file"), (40, "no safetensors file"), (-1, "cut short")]
)
def test_what_is_cut_leaves_no_adapter(tmp_path: Path, keep: int, why: str) -> None:
    (tmp_path / CONFIG).write_text("{}")
    save_file({"m.lora_A.default.weight": torch.ones(64)}, tmp_path / PARAMETERS)
    path = tmp_path / PARAMETERS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=why):
        extract(tmp_path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_file({"m.lora_A.default.weight": torch.ones(64)}, path)
    extract(tmp_path, tmp_path / "adapter")  # over what was left half written
    assert load_file(tmp_path / "adapter" / WEIGHTS).keys() == {"m.lora_A.weight"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        extract(tmp_path, tmp_path / "adapter")
