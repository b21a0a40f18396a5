"""Runs that must agree: ours and plain TRL's; one global batch however it is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.attempts import JOB, charts, run, steps

BENCH = Path(__file__).parents[1] / "bench" / "plain_trl.py"
FROZEN = r"model\.(vision_model|connector)(\..*)?"
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


def plain_trl(folder: Path, quantization: dict[str, Any] | None, training: dict[str, Any]) -> list[float]:
    """The loss of every step of `bench/plain_trl.py`, which uses nothing of the runner."""
    from runner.demo import resolve_model

    folder.mkdir()
    skip = {"llm_int8_skip_modules": ["model.vision_model", "model.connector", "lm_head"]}
    spec = {
        "model": str(resolve_model("demo:smolvlm-tiny")),
        "data": str(next(charts().glob("data/train*.parquet"))),
        "rows": 16,
        "seed": JOB["seed"],
        "dtype": "float32",
        "quantization": quantization and {**quantization, **skip},
        "processor": {},
        "lora": {**JOB["lora"], "exclude_modules": FROZEN},
        "training": {
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            **training,
        },
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(BENCH), str(folder / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])["losses"]
    return losses


@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
def test_our_losses_are_plain_trls_bit_for_bit(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    """Frozen parts without autograd, our collator and our sampler change no arithmetic in float32."""
    theirs = plain_trl(tmp_path / "plain", quantization, {})
    changes = {"quantization": quantization, "training": {"per_device_train_batch_size": 4}}
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
