"""Several processes train one run: every strategy with its engine in force, from one state to any other.

What one process does is what all have to agree with, in float32 and without dropout, under both methods and
with a quantized base and another; every strategy stands in one case at least of each of these four. In
bfloat16 the sums of other cuts round otherwise, so that there is nothing to hold them to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.plan import Strategy
from runner.request import Request, write
from runner.train.state import OPTIMIZER, PARAMETERS
from tests.attempts import JOB, merged, pairs, run_ranks, steps

ENGINES: dict[Strategy, tuple[str, str, int | None]] = {
    "single": ("PeftModelForCausalLM", "NO", None),
    "ddp": ("DistributedDataParallel", "MULTI_CPU", None),
    "zero1": ("DeepSpeedEngine", "DEEPSPEED", 1),
    "zero2": ("DeepSpeedEngine", "DEEPSPEED", 2),
    "zero3": ("DeepSpeedEngine", "DEEPSPEED", 3),
    "fsdp2": ("FSDPPeftModelForCausalLM", "FSDP", None),
}

SMALL = {"checkpoints": {"save_steps": 1}, "training": {"global_batch_size": 4, "max_steps": 5}}
"""Eight rows, so that an epoch ends after steps 2 and 4."""
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    # A key's bias has no gradient but the rounding, which Adam makes a step of.
    "float32 with biases": {
        "model": {"freeze": []},
        "lora": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    },
    "4-bit": {
        "quantization": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
        }
    },
}

"""Only the tower has biases, which have no weight decay: the optimizer has two groups there."""

Case = tuple[str, str]
"""Method and kind of base."""


class Runs:
    """Attempts of a case, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._alone: dict[Case, tuple[Path, list[dict[str, Any]]]] = {}

    def attempt(
        self, case: Case, strategy: Strategy, world: int, restore: Path | None = None, stops: bool = False
    ) -> tuple[Path, list[dict[str, Any]]]:
        """One attempt, with its engine looked at: its folder and its steps.

        Args:
            stops: whether it is asked to stop in its first step.
        """
        self._count += 1
        folder = self._folder / str(self._count)
        method, kind = case
        changes = merged(SMALL, KINDS[kind])
        train = {"path": "demo:charts", "format": "vqa", "columns": {"question": "query", "answer": "label"}}
        more: dict[str, Any] = {}
        if method == "dpo":
            train, more = {"path": "pairs", "format": "preference"}, {"data": pairs(self._folder)}
        changes |= {"method": method, "datasets": {"train": [{**train, "split": "train[:8]"}]}}

        def ask(event: dict[str, Any]) -> None:
            if stops and event["event"] == "begin":
                write(folder / "attempts" / "1", Request(action="stop"))

        outcome, events = run_ranks(folder, changes, strategy, world, ask, restore=restore, **more)
        assert outcome["outcome"] in (("done", "preempted") if stops else ("done",)), outcome
        if outcome["outcome"] == "done":
            facts = outcome["facts"]
            assert (facts["engine"], facts["distributed_type"], facts["zero_stage"]) == ENGINES[strategy]
            assert facts["trainable_dtypes"] == ["float32"]
        return folder, steps(events)

    def alone(self, case: Case) -> tuple[Path, list[dict[str, Any]]]:
        """The undisturbed run of one process."""
        if case not in self._alone:
            self._alone[case] = self.attempt(case, "single", 1)
        return self._alone[case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def checkpoint(folder: Path, step: int) -> Path:
    (found,) = (folder / "outbox").glob(f"{step:08d}-*")
    return found


def states(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Moments and parameters of a checkpoint."""
    where = checkpoint(folder, step)
    return {**load_file(where / OPTIMIZER), **load_file(where / PARAMETERS)}


def assert_agree(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same rows in every step, and the same losses but for the order of sums."""
    assert [step["ids"] for step in ours] == [step["ids"] for step in theirs]
    for mine, one in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """All is there, in float32, and the same but for the order of sums."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype == torch.float32, key
        assert torch.allclose(ours[key], value, atol=2e-4, rtol=1e-3), key


@pytest.mark.parametrize(
    ("method", "kind", "strategy", "world"),
    [
        ("sft", "4-bit", "zero2", 2),
        ("sft", "4-bit", "fsdp2", 4),
        ("sft", "float32", "ddp", 4),
        ("sft", "float32 with biases", "zero1", 2),
        ("sft", "float32", "zero3", 2),
        ("dpo", "4-bit", "zero3", 2),
        ("dpo", "4-bit", "ddp", 4),
        ("dpo", "float32", "fsdp2", 2),
        ("dpo", "float32", "zero2", 2),
    ],
)
def test_several_processes_are_the_run_of_one(
    runs: Runs, method: str, kind: str, strategy: Strategy, world: int
) -> None:
    """And a resume by the same strategy is the same run to the last bit."""
    reference, expected = runs.alone((method, kind))
    whole, made = runs.attempt((method, kind), strategy, world)
    assert_agree(made, expected)
    assert_close(states(whole, 5), states(reference, 5))

    resumed, rest = runs.attempt((method, kind), strategy, world, restore=checkpoint(whole, 3))
    assert [step["loss"] for step in rest] == [step["loss"] for step in made[3:]]
    kept = states(resumed, 5)
    for key, value in states(whole, 5).items():
        assert torch.equal(value, kept[key]), key


@pytest.mark.parametrize("case", [("sft", "4-bit"), ("dpo", "float32")])
def test_one_run_goes_from_one_world_and_strategy_to_the_next(runs: Runs, case: Case) -> None:
    """1 -> 2 -> 4 -> 2 -> 1 processes, each preempted after a step: what the run of one process is."""
    reference, expected = runs.alone(case)
    folder = reference
    chain: list[tuple[Strategy, int]] = [("zero2", 2), ("ddp", 4), ("fsdp2", 2), ("single", 1)]
    for done, (strategy, world) in enumerate(chain, start=1):
        folder, made = runs.attempt(case, strategy, world, restore=checkpoint(folder, done), stops=True)
        # A slow machine may stop a step later; the next attempt begins where this one should have stopped.
        assert_agree(made, expected[done : done + len(made)])
        assert_close(states(folder, done + 1), states(reference, done + 1))


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_model_in_parts_answers_every_row_once(tmp_path: Path, strategy: Strategy) -> None:
    """Three rows on two ranks, before training and after it, when each holds a part of the weights."""
    source = {**JOB["datasets"]["train"][0], "split": "val[:3]"}
    changes = {
        "datasets": {"eval": [source]},
        "evaluation": {"max_new_tokens": 4, "batch_size": 1},
        "training": {"max_steps": 1},
    }
    outcome, _ = run_ranks(tmp_path, changes, strategy, 2)
    assert outcome["outcome"] == "done", outcome
    for label in ("before", "after"):
        lines = (tmp_path / "evaluation" / f"{label}.predictions.jsonl").read_text().splitlines()
        assert len({json.loads(line)["row"] for line in lines}) == len(lines) == 3
        assert outcome["metrics"][label]["relaxed_accuracy"]["n"] == 3
