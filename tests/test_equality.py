"""Runs that must agree: ours and plain TRL's; one global batch however it is cut."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.attempts import JOB, merged, run, steps
from tests.plain import plain_trl

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
def test_our_losses_are_plain_trls_bit_for_bit(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    """Frozen parts without autograd, our collator and our sampler change no arithmetic in float32. Rows that
    share a prompt round otherwise in the last bit (`tests/test_shared.py`)."""
    theirs = plain_trl(tmp_path / "plain", quantization, {})
    changes = {
        "quantization": quantization,
        "training": {"per_device_train_batch_size": 4},
        "speed": {"share_prompt": False},
    }
    _, events = run(tmp_path / "ours", changes)
    ours = [step["loss"] for step in steps(events)]
    assert len(ours) == 4
    assert ours == theirs


@pytest.mark.parametrize("rows", [16, 13])
def test_a_global_batch_is_the_same_however_it_is_cut(tmp_path: Path, rows: int) -> None:
    """1 x 8, 2 x 4, 8 x 1: the same rows in every step, the same losses to 1e-5 (float32, no dropout)."""
    source = {**JOB["datasets"]["train"][0], "split": f"train[:{rows}]"}
    cuts = {}
    for size in (1, 2, 8):
        changes = {"datasets": {"train": [source]}, "training": {"per_device_train_batch_size": size}}
        outcome, events = run(tmp_path / str(size), changes)
        assert outcome["outcome"] == "done"
        cuts[size] = steps(events)
    for size in (2, 8):
        assert [step["ids"] for step in cuts[size]] == [step["ids"] for step in cuts[1]]
        for mine, other in zip(cuts[size], cuts[1], strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert len(cuts[1]) == 4
    assert all(len(step["ids"]) == 8 for step in cuts[1])
    assert {index for step in cuts[1][:2] for index in step["ids"]} == set(range(rows))


@pytest.mark.parametrize("order", ["by_length", "by_image"])
def test_a_resume_in_mid_epoch_goes_on_in_the_order_of_the_job(tmp_path: Path, order: str) -> None:
    """Saved after step 1 of 2 an epoch. In the same cut it ends with the same bytes, in another one it sees
    the same rows."""
    changes = {
        "datasets": {"order": order},
        "lora": {"lora_dropout": 0.1},
        "training": {"per_device_train_batch_size": 2, "dataloader_num_workers": 1},
        "checkpoints": {"save_steps": 1},
    }
    outcome, events = run(tmp_path / "whole", changes)
    assert outcome["outcome"] == "done"
    whole = steps(events)
    assert {index for step in whole[:2] for index in step["ids"]} == set(range(16))
    (saved,) = (tmp_path / "whole" / "outbox").glob("00000001*")
    adapters = []
    for size in (2, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        restored = shutil.copytree(saved, folder / "restored" / saved.name)
        cut = merged(changes, {"training": {"per_device_train_batch_size": size}})
        outcome, events = run(folder / "run", cut, attempt=2, restore=restored)
        assert outcome["outcome"] == "done"
        assert [step["ids"] for step in steps(events)] == [step["ids"] for step in whole[1:]]
        adapters.append((folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
