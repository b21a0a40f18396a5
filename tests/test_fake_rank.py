"""The trainer without torch keeps the contract that it stands in for: waits, goes on, stops, breaks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import request
from runner.checkpoint.files import verify
from runner.request import Request

RANK = Path(__file__).with_name("fake_rank.py")


class Attempt:
    """One attempt as a process, its events as they come, and a supervisor's ends of the pipes."""

    def __init__(self, run: Path, number: int, script: dict[str, Any], restore: Path | None) -> None:
        self.folder = run / "attempts" / str(number)
        self.folder.mkdir(parents=True)
        (run / "outbox").mkdir(exist_ok=True)
        plan = {
            "purpose": "train",
            "run_dir": str(run),
            "attempt_dir": str(self.folder),
            "epoch": 7,
            "attempt": number,
            "geometry": {"per_device": 2, "world": 1},
            "strategy": "single",
            "probe": False,
            "restore": None if restore is None else str(restore),
            "job": {"training": {"per_device_train_batch_size": 2}},
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))
        lifeline, self._alive = os.pipe()
        reader, events = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(RANK), json.dumps(script), str(self.folder / "plan.json")],
            env={
                **os.environ,
                "PYTHONPATH": str(RANK.parents[1]),
                "RUNNER_EVENTS_FD": str(events),
                "RUNNER_LIFELINE_FD": str(lifeline),
            },
            pass_fds=[events, lifeline],
        )
        os.close(events)
        os.close(lifeline)
        self.events = os.fdopen(reader)

    def until(self, **fields: Any) -> dict[str, Any]:
        """The next event that has these fields."""
        for line in self.events:
            event: dict[str, Any] = json.loads(line)
            if event.items() >= fields.items():
                return event
        raise AssertionError(f"it ended without {fields}")

    def close(self) -> None:
        os.close(self._alive)
        self.process.wait()
        self.events.close()


@contextlib.contextmanager
def started(run: Path, number: int = 1, restore: Path | None = None, **script: Any) -> Iterator[Attempt]:
    attempt = Attempt(run, number, {"steps": 6, "save": 4, **script}, restore)
    try:
        yield attempt
    finally:
        attempt.close()


def finished(attempt: Attempt) -> str:
    """The outcome of an attempt that ends by itself."""
    for _ in attempt.events:
        pass
    attempt.process.wait()
    outcome: str = json.loads((attempt.folder / "outcome.json").read_text())["outcome"]
    return outcome


def test_it_waits_goes_on_stops_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    with started(tmp_path / "whole") as attempt:
        assert finished(attempt) == "done"
    saved = ["00000004-000007-0001", "00000006-000007-0001"]
    assert sorted(path.name for path in (tmp_path / "whole" / "outbox").iterdir()) == saved

    run = tmp_path / "asked"
    with started(run, step_seconds=0.02) as attempt:
        attempt.until(event="begin", step=1)
        request.write(attempt.folder, Request("wait"))
        newest = attempt.until(event="checkpoint")
        attempt.until(event="phase", phase="wait")
        request.write(attempt.folder, Request("go"))
        assert attempt.until(event="begin")["step"] == newest["step"] + 1
        request.write(attempt.folder, Request("wait"))
        newest = attempt.until(event="checkpoint")
        attempt.until(event="phase", phase="wait")
        request.write(attempt.folder, Request("stop"))
        assert finished(attempt) == "preempted"
    with started(run, number=2, restore=Path(newest["path"])) as attempt:
        assert finished(attempt) == "done"
    weights = [(folder / "adapter" / "weights").read_text() for folder in (tmp_path / "whole", run)]
    assert weights[0] == weights[1]


def test_a_checkpoint_has_a_body_of_which_a_part_never_changes(tmp_path: Path) -> None:
    with started(tmp_path, frozen_bytes=70_000, state_bytes=50_000) as attempt:
        assert finished(attempt) == "done"
    first, last = (verify(path).files for path in sorted((tmp_path / "outbox").iterdir()))
    assert first["frozen.bin"] == last["frozen.bin"]
    assert (last["frozen.bin"].size, last["state.bin"].size) == (70_000, 50_000)
    assert first["state.bin"].sha256 != last["state.bin"].sha256


def test_it_notices_a_checkpoint_that_is_not_what_was_saved(tmp_path: Path) -> None:
    with started(tmp_path) as attempt:
        assert finished(attempt) == "done"
    checkpoint = tmp_path / "outbox" / "00000004-000007-0001"
    (checkpoint / "frozen.bin").write_bytes(b"x" * 1000)
    with started(tmp_path, number=2, restore=checkpoint) as attempt:
        assert attempt.process.wait() == 1


@pytest.mark.parametrize("how", ["stall", "swell:64"])
def test_it_says_nothing_more_and_dies_with_its_supervisor(tmp_path: Path, how: str) -> None:
    with started(tmp_path, faults=[{"at": "step:3", "how": how}]) as attempt:
        attempt.until(event="begin", step=3)
        if how.startswith("swell"):
            while not (attempt.folder / "waiting").exists():
                assert attempt.process.poll() is None
                time.sleep(0.005)
            status = Path(f"/proc/{attempt.process.pid}/status").read_text()
            resident = int(status.partition("VmRSS:")[2].split()[0])  # KiB
            assert resident > 64 << 10
        assert attempt.process.poll() is None
    assert attempt.process.returncode == -9
