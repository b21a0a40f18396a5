"""Adapters in the weights of their base: of every kind that trains here, and what must not be merged.

The runs are real ones of a step or two; what a fresh process makes of an export is in tests/test_export.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from runner.demo import resolve_model
from runner.errors import DataError, JobError, StorageError
from runner.export.likeness import TOLERANCE, Step, likeness
from runner.export.order import Made, Order
from runner.manifest import Job
from runner.train import merging, plain
from runner.train.channel import Channel
from runner.train.export import export
from tests.attempts import JOB, charts, merged, pairs, run
from tests.test_disk import mounted

BASE = resolve_model("demo:smolvlm-tiny")
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EVAL = [{**JOB["datasets"]["train"][0], "split": "test[:6]"}]
COMMON = {
    "datasets": {"eval": EVAL},
    "training": {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
    "evaluation": {"max_new_tokens": 4, "baseline": False},
}


def trained(folder: Path, changes: dict[str, Any], **fields: Any) -> Path:
    outcome, _ = run(folder, merged(COMMON, changes), **fields)
    assert outcome["outcome"] == "done", outcome
    return folder


def order(folder: Path, to: Path, changes: dict[str, Any], **fields: Any) -> Order:
    """An order to merge what a run trained."""
    recorded = folder / "evaluation" / "after.predictions.jsonl"
    given = {
        "kind": "merged",
        "job": Job.model_validate(merged(JOB, merged(COMMON, changes))),
        "base": str(BASE),
        "trained": folder / "adapter",
        "dtype": "float32",
        "compare": 100,
        "evals": [str(charts())],
        "recorded": recorded if recorded.is_file() else None,
        "to": to,
    }
    return Order(**{**given, **fields})


def made(one: Order) -> Made:
    return export(one, Channel(one.to.parent, None))


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("four-bit"), {"quantization": FOUR_BIT})


KINDS = {
    "8-bit, rsLoRA": {"quantization": {"load_in_8bit": True}, "lora": {"use_rslora": True}},
    "unquantized, DoRA": {"lora": {"use_dora": True}},
    "modules_to_save": {"lora": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
def test_merged_models_are_base_and_adapter(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = made(order(trained(tmp_path / "run", changes), tmp_path / "to", changes))
    assert found.compared is not None
    assert (found.compared.questions, found.compared.equal, found.compared.ties) == (6, 6, 0)
    assert 0 < found.compared.apart <= TOLERANCE["float32"] / 10
    assert differs_from_base(tmp_path / "to")


def differs_from_base(folder: Path) -> bool:
    base, here = load_file(BASE / "model.safetensors"), load_file(folder / "model.safetensors")
    assert base.keys() == here.keys()
    changed = [name for name in base if not torch.equal(base[name].float(), here[name].float())]
    assert not any("vision" in name or "connector" in name for name in changed), "frozen"
    return bool(changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_dtype_agrees_within_its_own_tolerance(tmp_path: Path, four_bit: Path, dtype: str) -> None:
    changes = {"quantization": FOUR_BIT}
    found = made(order(four_bit, tmp_path / "to", changes, dtype=dtype))
    assert found.compared is not None and found.metrics["merged"] is not None
    assert found.compared.equal + found.compared.ties == found.compared.questions == 6
    assert TOLERANCE["float32"] < found.compared.apart <= TOLERANCE[dtype]
    assert {value.dtype for value in load_file(tmp_path / "to" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    # What the run measured, over its 4-bit base, on the same rows.
    after = json.loads((four_bit / "evaluation" / "after.json").read_text())["metrics"]
    assert found.metrics["run"] == after
    assert found.like_run is not None


def test_an_adapter_that_went_on_from_another_under_dpo(tmp_path: Path, four_bit: Path) -> None:
    start = str(four_bit / "adapter")
    rows = pairs(tmp_path)
    source = {"path": "pairs", "format": "preference"}
    changes = {
        "method": "dpo",
        "quantization": FOUR_BIT,
        "lora": {"init_from": start},
        "datasets": {"train": [source], "eval": [{**source, "max_samples": 4}]},
        "training": {"max_steps": 1},
    }
    folder = trained(tmp_path / "run", changes, data=rows, init_from=start)
    found = made(order(folder, tmp_path / "to", changes, evals=[str(rows)]))
    assert found.compared is not None and found.compared.equal == found.compared.questions == 4
    accuracy = found.metrics["merged"]
    assert accuracy is not None and accuracy["preference_accuracy"]["n"] == 4


def adapter(folder: Path, base: Any, **config: Any) -> Path:
    """One with values that matter, as PEFT saves it."""
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **config))
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.5
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with one parameter for both ends."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASE).save_pretrained(folder)
    return folder


TEXT, HEAD = ["q_proj"], ["q_proj", "lm_head"]


@pytest.mark.parametrize(
    ("config", "stays_tied", "input_stays"),
    [
        ({"target_modules": TEXT}, True, True),
        ({"target_modules": HEAD}, False, True),
        ({"target_modules": TEXT, "trainable_token_indices": [5, 20]}, True, False),
    ],
    ids=["text", "head", "tokens of both"],
)
# PEFT says it of the adapter, and asks for what merging does: a head of its own.
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_a_tied_head_is_its_own_only_if_the_adapter_changed_it(
    tmp_path: Path, tied: Path, config: dict[str, Any], stays_tied: bool, input_stays: bool
) -> None:
    base = AutoModelForImageTextToText.from_pretrained(tied, dtype=torch.float32)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    folder = adapter(tmp_path / "adapter", base, exclude_modules=".*vision.*", **config)
    found = made(order(tmp_path, tmp_path / "to", {}, base=str(tied), trained=folder, recorded=None))
    assert found.compared is not None and found.compared.equal == 6
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is stays_tied
    weights = load_file(tmp_path / "to" / "model.safetensors")
    assert ("lm_head.weight" in weights) is not stays_tied
    name = "model.text_model.embed_tokens.weight"
    assert torch.equal(weights[name], load_file(tied / "model.safetensors")[name]) is input_stays
    # What plain PEFT makes of the same adapter over the tied base.
    base = AutoModelForImageTextToText.from_pretrained(tied, dtype=torch.float32)
    beside = PeftModel.from_pretrained(base, folder).eval()
    truth = plain.answer(beside, AutoProcessor.from_pretrained(tied), [one.ids for one in found.answer])
    steps = tuple(Step.model_validate(one) for one in truth["steps"])
    same = likeness(found.answer, steps, TOLERANCE["float32"])
    assert same.equal and same.within and same.apart < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_went_wrong_is_told_from_rounding(
    tmp_path: Path, four_bit: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT would, were it to forget the adapter of every layer."""
    monkeypatch.setattr(merging, "merged", lambda adapted: adapted.unload())
    with pytest.raises(DataError, match=r"is not base \+ adapter: of 6 answers .* token \d+.*remedy: "):
        made(order(four_bit, tmp_path / "to", {"quantization": FOUR_BIT}, dtype=dtype))


def test_a_damaged_adapter_is_named(tmp_path: Path, four_bit: Path) -> None:
    whole = four_bit / "adapter"
    for name, harm, words in (
        ("cut", lambda data: data[:-100], "cannot load"),
        ("nan", None, "holds numbers that are none"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
        file = "adapter_model.safetensors"
        if harm is not None:
            (folder / file).write_bytes(harm((whole / file).read_bytes()))
        else:
            tensors = load_file(whole / file)
            tensors[sorted(tensors)[0]][0, 0] = float("nan")
            save_file(tensors, folder / file)
        for kind in ("adapter", "merged"):
            one = order(four_bit, tmp_path / f"{name}-{kind}", {}, trained=folder, kind=kind, compare=0)
            with pytest.raises(DataError, match=words):
                made(one)


def test_a_disk_that_fills_up_is_named(tmp_path: Path, four_bit: Path) -> None:
    with mounted(tmp_path / "disk") as disk:
        disk.fill(leave=1 << 20)
        to = disk.path / "to"
        with pytest.raises(StorageError, match=f"write the merged model: {to}: No space left"):
            made(order(four_bit, to, {"quantization": FOUR_BIT}, compare=0))


def test_a_model_that_was_trained_whole_is_exported_as_it_is(tmp_path: Path) -> None:
    changes = {"lora": None, "training": {"max_steps": 1}, "evaluation": {"max_new_tokens": 1}}
    folder = trained(tmp_path / "run", changes)
    one = order(folder, tmp_path / "to", changes, kind="model", trained=folder / "model", compare=0)
    found = made(one)
    assert found.quantization is None and found.compared is None and found.answer
    assert (tmp_path / "to" / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "to" / "processor_config.json").is_file()


def test_an_adapter_that_moved_its_quantized_base_is_not_merged(tmp_path: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    folder = adapter(tmp_path / "adapter", base, target_modules=["q_proj"], exclude_modules=".*vision.*")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "olora"}))
    one = order(tmp_path, tmp_path / "to", {"quantization": FOUR_BIT}, trained=folder, compare=0)
    with pytest.raises(JobError, match="olora changed the quantized base"):
        made(one)
    made(order(tmp_path, tmp_path / "to", {}, trained=folder, compare=0))  # over the same base it is right
