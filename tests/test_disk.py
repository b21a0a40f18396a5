"""A disk that is full, a real one: a small file system of its own, filled while a run works on it.

The place is named with the remedy, the run ends with 74, what is committed stays as it is, and with room the
same command goes on to the end of a run that nobody disturbed. Mounting takes a right that only root has.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.folder import FolderStore
from runner.checkpoint.store import Store
from tests.attempts import run
from tests.machines import Bench, World, at, whole

SIZE = 8 << 20
STATE = 1 << 20
"""Bytes of the small disk, and of a file of each checkpoint."""

REMEDY = "free space there and give the same command again; it goes on from the last checkpoint"


class Disk:
    """A small file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Take all the space but so many bytes."""
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * (1 << 16))
        if leave:
            os.truncate(self._ballast, self._ballast.stat().st_size - leave)

    def empty(self) -> None:
        self._ballast.unlink()


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    with mounted(tmp_path / "disk") as disk:
        yield disk


def on(disk: Disk, bench: Bench) -> Bench:
    """Its runs on the small disk."""
    bench.runs = disk.path / "runs"
    bench.run = bench.runs / "bench"
    return bench


def filled_at(bench: Bench, disk: Disk, place: str, committed: int = 2, leave: int = 0) -> tuple[int, str]:
    """A run, and a disk that is full from this place of the trainer on, with what is committed there."""
    process = bench.start(at(place, "hold"), state_bytes=STATE)
    bench.wait_for(bench.waiting(), process)
    bench.wait_for(lambda: any(event["step"] == committed for event in bench.said("commit")), process)
    disk.fill(leave)
    (bench.run / "attempts" / "1" / "go").symlink_to("/")
    return process.finish()


def clear(code: int, output: str, place: Path | str) -> None:
    """One message that names the place and the remedy, and no traceback."""
    assert code == 74, output
    assert "Traceback" not in output
    assert f"{place}" in output
    assert REMEDY in output


def goes_on(bench: Bench, disk: Disk, store: Store, undisturbed: str, committed: int = 2) -> None:
    """What is committed is whole; with room, the same command goes on from it."""
    assert whole(store, bench.path)[0] == committed
    disk.empty()
    code, output = bench.train(state_bytes=STATE)
    assert code == 0, output
    assert [event["step"] for event in bench.said("attempt")][-1] >= committed
    assert bench.weights() == undisturbed
    assert whole(store, bench.path)[0] == 6


@pytest.mark.parametrize("leave", [0, STATE // 2])
def test_full_while_the_trainer_saves(bench: Bench, disk: Disk, undisturbed: str, leave: int) -> None:
    """With no room at all, or with room for all but a checkpoint."""
    on(disk, bench)
    code, output = filled_at(bench, disk, "step:4", leave=leave)
    clear(code, output, bench.run)
    if leave:
        assert "save a checkpoint" in output
        assert (bench.result()["exit_code"], bench.result()["attempts"]) == (74, 1)
    goes_on(bench, disk, FolderStore(bench.run / "checkpoints"), undisturbed)


def test_full_when_little_things_are_written(bench: Bench, disk: Disk, undisturbed: str) -> None:
    """The checkpoint is published, and then not even an event has room."""
    on(disk, bench)
    code, output = filled_at(bench, disk, "told:4", committed=4)
    clear(code, output, bench.run)
    goes_on(bench, disk, FolderStore(bench.run / "checkpoints"), undisturbed, committed=4)


def test_full_before_the_run_begins(bench: Bench, disk: Disk, undisturbed: str) -> None:
    on(disk, bench)
    disk.fill()
    code, output = bench.train(state_bytes=STATE)
    clear(code, output, bench.run)
    disk.empty()
    code, output = bench.train(state_bytes=STATE)
    assert code == 0, output
    assert bench.weights() == undisturbed


def test_store_is_full_and_this_machine_is_not(bench: Bench, disk: Disk, undisturbed: str) -> None:
    bench.job["checkpoints"] = {"uri": str(disk.path / "store")}
    code, output = filled_at(bench, disk, "step:4")
    clear(code, output, disk.path / "store")
    assert bench.result()["exit_code"] == 74
    goes_on(bench, disk, FolderStore(disk.path / "store" / "bench"), undisturbed)


@pytest.mark.parametrize("leave", [0, STATE // 2])
def test_no_room_to_restore_on_another_machine(
    world: World, disk: Disk, undisturbed: str, leave: int
) -> None:
    process = world.first.start(at("step:3", "hold"), at("step:5", "crash:65"), state_bytes=STATE)
    world.first.wait_for(world.first.waiting(), process)
    world.first.wait_for(lambda: bool(world.first.said("commit")), process)
    (world.first.run / "attempts" / "1" / "go").touch()
    assert process.finish()[0] == 65
    retained = world.head().retained
    second = on(disk, world.machine())
    disk.fill(leave)
    code, output = second.train(state_bytes=STATE)
    clear(code, output, disk.path)
    assert (world.head().retained, world.head().bad) == (retained, ())
    disk.empty()
    code, output = second.train(state_bytes=STATE)
    assert code == 0, output
    assert second.weights() == undisturbed
    assert whole(world.store(), world.path)[0] == 6


def test_full_while_the_real_trainer_saves(disk: Disk) -> None:
    """Room for little things is left, and not for a checkpoint."""

    def fill(event: dict[str, Any]) -> None:
        if event["event"] == "begin":
            disk.fill(leave=96 << 10)

    outcome, _ = run(disk.path / "run", {"training": {"max_steps": 1}}, on_event=fill)
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 74)
    assert REMEDY in outcome["error"] and "saving-00000001" in outcome["error"]
    assert not list((disk.path / "run" / "outbox").iterdir())
