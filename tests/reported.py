"""Real runs for the tests of reports: a small sft run that was preempted twice and ran out of memory once,
and a small dpo run. Supervisor and trainers are the real ones; so are signals, and allocations that fail.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from runner import events, launch
from runner.errors import RunnerError
from runner.settings import resolve
from tests import warm
from tests.machines import Command

ROOT = Path(__file__).parents[1]

STEPS = 10
PREEMPTED_AT = (2, 5)
"""Steps that are done when SIGTERM comes; the step at work is done, too, before the run stops."""
FULL_AT = 9
"""The step that does not fit any more in micro-batches of eight rows."""

PATIENCE = 180.0
"""Seconds for a machine that does much else."""

SFT = (
    f"training.max_steps={STEPS}",
    "training.global_batch_size=16",
    "training.per_device_train_batch_size=8",
    "training.eval_strategy=steps",
    "training.eval_steps=4",
    "datasets.train[0].split=train[:160]",
    "evaluation.max_samples=24",
    "evaluation.batch_size=24",
    "evaluation.steps=4",
    "checkpoints.save_steps=4",
)
DPO = (
    "training.max_steps=4",
    "training.global_batch_size=8",
    "training.per_device_train_batch_size=8",
    "datasets.train[0].split=train[:32]",
    "evaluation.max_samples=12",
    "evaluation.batch_size=12",
    "evaluation.max_new_tokens=12",
)


def sft(folder: Path) -> Path:
    """The run that went through everything; its folder."""
    cap = json.dumps([{"rows": 4, "step": FULL_AT}])
    trainer = warm.command("tests.capped_trainer", cap)
    run = folder / "runs" / "demo-sft"
    for step in PREEMPTED_AT:
        command = _train(folder, "demo-sft", SFT, trainer)
        _wait(run, step, command)
        command.send(signal.SIGTERM)
        _ended(command, 75)
    _ended(_train(folder, "demo-sft", SFT, trainer), 0)
    return run


def dpo(folder: Path) -> Path:
    """A run that nothing happened to; its folder."""
    _ended(_train(folder, "demo-dpo", DPO, warm.command("runner.train")), 0)
    return folder / "runs" / "demo-dpo"


def _train(folder: Path, job: str, overrides: tuple[str, ...], trainer: list[str]) -> Command:
    def act() -> int:
        try:
            resolved = resolve(str(ROOT / "jobs" / f"{job}.yaml"), list(overrides), {})
            return launch.train(resolved, folder / "runs", trainer=trainer)
        except RunnerError as error:
            return error.exit_code

    return Command(act, folder)


def _wait(run: Path, step: int, command: Command) -> None:
    """Until that step is done."""
    deadline = time.monotonic() + PATIENCE
    while step not in _done(run):
        assert time.monotonic() < deadline and command.poll() is None, command.output()
        time.sleep(0.02)


def _ended(command: Command, expected: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while (code := command.poll()) is None:
        assert time.monotonic() < deadline, command.output()
        time.sleep(0.02)
    assert code == expected, command.output()


def _done(run: Path) -> set[Any]:
    return {event["step"] for event in events.read(run / "events.jsonl") if event["event"] == "step"}
