"""Several processes train one run: every strategy with its engine in force, from one state to any other.

What one process does is what all have to agree with, in float32 and without dropout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.plan import Strategy
from runner.train.state import OPTIMIZER, PARAMETERS
from tests.attempts import merged, run_ranks, steps

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
EVERY_STEP = {"checkpoints": {"save_steps": 1}}

ENGINES: dict[Strategy, tuple[str, str, int | None]] = {
    "ddp": ("DistributedDataParallel", "MULTI_CPU", None),
    "zero1": ("DeepSpeedEngine", "DEEPSPEED", 1),
    "zero2": ("DeepSpeedEngine", "DEEPSPEED", 2),
    "zero3": ("DeepSpeedEngine", "DEEPSPEED", 3),
    "fsdp2": ("FSDPPeftModelForCausalLM", "FSDP", None),
}


def base(kind: str) -> dict[str, Any]:
    return merged(EVERY_STEP, {"quantization": FOUR_BIT} if kind == "4-bit" else {})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process, by kind: its folder and its losses."""
    runs: dict[str, tuple[Path, list[float]]] = {}

    def get(kind: str) -> tuple[Path, list[float]]:
        if kind not in runs:
            folder = tmp_path_factory.mktemp("alone")
            outcome, events = run_ranks(folder, base(kind), "single", 1)
            assert outcome["outcome"] == "done", outcome
            runs[kind] = folder, [step["loss"] for step in steps(events)]
        return runs[kind]

    return get


def checkpoint(folder: Path, step: int) -> Path:
    (found,) = (folder / "outbox").glob(f"{step:08d}-*")
    return found


def states(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Moments and parameters of a checkpoint."""
    where = checkpoint(folder, step)
    return {**load_file(where / OPTIMIZER), **load_file(where / PARAMETERS)}


@pytest.mark.parametrize("strategy", ENGINES)
@pytest.mark.parametrize("kind", ["float32", "4-bit"])
def test_two_processes_are_the_run_of_one(tmp_path: Path, alone: Any, kind: str, strategy: Strategy) -> None:
    """Two steps, then a resume by the same strategy: the same bytes; and from one process's step 2: the same
    losses and moments."""
    reference, losses = alone(kind)
    changes = base(kind)
    whole, events = run_ranks(tmp_path / "whole", changes, strategy, 2)
    assert whole["outcome"] == "done", whole
    facts = whole["facts"]
    assert (facts["engine"], facts["distributed_type"], facts["zero_stage"]) == ENGINES[strategy]
    assert facts["trainable_dtypes"] == ["float32"]
    assert [step["loss"] for step in steps(events)] == pytest.approx(losses, abs=1e-4)
    assert [len(step["ids"]) for step in steps(events)] == [8] * 4

    for name, folder in (("same", tmp_path / "whole"), ("other", reference)):
        resumed = tmp_path / name
        outcome, events = run_ranks(resumed, changes, strategy, 2, restore=checkpoint(folder, 2))
        assert outcome["outcome"] == "done", outcome
        assert [step["step"] for step in steps(events)] == [3, 4]
        assert [step["loss"] for step in steps(events)] == pytest.approx(losses[2:], abs=1e-4)
    for key, value in states(tmp_path / "whole", 4).items():
        assert torch.equal(value, states(tmp_path / "same", 4)[key]), key
    ours, theirs = states(tmp_path / "other", 4), states(reference, 4)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.allclose(ours[key], value, atol=2e-4, rtol=1e-3), key
