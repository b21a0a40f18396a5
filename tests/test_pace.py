"""How often a run saves, what is at risk, what a trainer is asked for: rows of tables, on a fake clock."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.head import Entry
from runner.errors import JobError
from runner.events import EventLog
from runner.supervisor.direct import Director, grace_seconds
from runner.supervisor.journal import Journal
from runner.supervisor.pace import Pace, save_interval
from runner.supervisor.screen import Screen


@pytest.mark.parametrize(
    ("max_loss", "save", "commit", "step", "interval"),
    [
        (3600, 1, 1, None, 120),  # sqrt(2 x 1 x 7200)
        (3600, 0.01, 1, 30, 12),
        (120, 1, 5, None, 114),  # what is at risk when the commit arrives: 114 + 1 + 5
        (120, 1, 5, 20, 94),  # and the step at whose end the save comes
        (60, None, None, None, 44),  # 1 s and a quarter of max_loss until they are measured
        (10, 4, 8, None, 4),  # cannot be kept: half of the time trains
        (600, 100, 20, None, 480),
    ],
)
def test_interval(
    max_loss: float, save: float | None, commit: float | None, step: float | None, interval: float
) -> None:
    assert save_interval(max_loss, save, commit, step) == pytest.approx(interval)


class World:
    def __init__(self, path: Path, grace: float | None = None) -> None:
        self.time = 0.0
        self.path = path
        self.screen = io.StringIO()
        self.log = EventLog(path / "events.jsonl")
        self.journal = Journal(self.log, Screen(self.screen), lambda: None)
        self.pace = Pace(100, lambda: self.time)
        self.director = Director(self.pace, grace, self.journal, lambda: self.time)
        self.director.begin(path)
        self.phase("train")

    def phase(self, name: str) -> None:
        self.pace.note({"event": "phase", "phase": name})

    def saved(self, id: str, seconds: float = 1.0) -> None:
        self.pace.note({"event": "checkpoint", "id": id, "step": 1, "seconds": seconds})

    def committed(self, id: str, seconds: float = 2.0) -> None:
        self.pace.committed(Entry(id=id, step=1, key=id, manifest_sha256=""), seconds)

    def asked(self) -> dict[str, Any]:
        file = self.path / "request.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"action": None}
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with world.log:
        yield world


@pytest.fixture
def with_grace(tmp_path: Path) -> Iterator[Callable[[float | None], World]]:
    with contextlib.ExitStack() as stack:

        def make(grace: float | None) -> World:
            world = World(tmp_path, grace)
            stack.enter_context(world.log)
            return world

        yield make


def test_what_is_at_risk_is_training_since_the_save_of_what_is_committed(world: World) -> None:
    world.time = 30
    world.saved("a")
    world.time = 50
    assert world.pace.at_risk == 50
    world.committed("a")
    assert world.pace.at_risk == 20
    world.phase("evaluate")
    world.time = 500
    assert world.pace.at_risk == 20
    world.phase("train")
    world.time = 510
    assert world.pace.at_risk == 30
    world.director.begin(world.path)  # another attempt, from what is committed
    assert world.pace.at_risk == 0


def test_long_steps_are_saved_before_training_has_to_wait(world: World) -> None:
    world.saved("a", 1.0)
    world.committed("a", 2.0)
    world.pace.note({"event": "step", "seconds": 30.0})
    assert world.pace.save_seconds == 67.0
    world.pace.note({"event": "step", "seconds": 10.0})
    assert world.pace.save_seconds == 73.0


def test_a_save_that_was_replaced_counts_no_more(world: World) -> None:
    for at, id in ((10, "a"), (20, "b"), (30, "c")):
        world.time = at
        world.saved(id)
    world.committed("b")
    assert world.pace.at_risk == 10
    world.committed("a")  # cannot be, and moves nothing back
    assert world.pace.at_risk == 10
    world.committed("c")
    assert world.pace.at_risk == 0


def test_training_waits_when_it_is_further_ahead_than_max_loss_and_goes_on(world: World) -> None:
    world.time = 90
    world.saved("a")
    assert world.director.look() is None and world.asked()["action"] in (None, "go")
    world.time = 100
    assert world.director.look() is None
    assert world.asked()["action"] == "wait"
    world.phase("wait")
    world.time = 5000
    world.director.look()
    assert world.asked()["action"] == "wait"
    world.committed("a", 4900)
    assert world.pace.at_risk == 10
    world.director.look()
    assert world.asked()["action"] == "go"
    assert "not in the store yet" in world.screen.getvalue()


def test_interval_is_told_when_it_has_changed(world: World) -> None:
    world.director.look()
    assert world.asked()["action"] is None  # the plan has it
    world.saved("a", 0.001)
    world.director.look()
    assert world.asked()["save_seconds"] == pytest.approx(3.79, abs=0.01)
    before = (world.path / "request.json").stat().st_mtime_ns
    world.saved("b", 0.0011)
    world.director.look()
    assert (world.path / "request.json").stat().st_mtime_ns == before


def test_max_loss_that_cannot_be_kept_is_said_once(world: World) -> None:
    world.saved("a", 40)
    world.committed("a", 70)
    for _ in range(3):
        world.director.look()
    assert world.screen.getvalue().count("training waits for the store at every save") == 1


@pytest.mark.parametrize(
    ("grace", "ends"),
    [(None, False), (60, False), (5, False), (3.9, True), (1, True), (0, True)],
)
def test_notice_asks_to_save_where_there_is_time(
    with_grace: Callable[[float | None], World], grace: float | None, ends: bool
) -> None:
    world = with_grace(grace)
    world.saved("a", 1)
    world.committed("a", 2)  # so a save and its commit take 3 s; one more is for the end of the process
    assert world.director.stop("SIGTERM") is ends
    assert (world.asked()["action"] == "stop") is not ends


@pytest.mark.parametrize(
    ("grace", "left", "ends"),
    [(None, 5, False), (None, 3.9, True), (60, 3.9, True), (3.9, 60, True), (60, 5, False)],
)
def test_shorter_of_grace_and_notice_counts(
    with_grace: Callable[[float | None], World], grace: float | None, left: float, ends: bool
) -> None:
    world = with_grace(grace)
    world.saved("a", 1)
    world.committed("a", 2)
    assert world.director.stop("the cloud", left) is ends
    assert world.director.deadline == min(left, grace or left) - 1


def test_advice_asks_for_one_save_more_whatever_else_is_asked(world: World) -> None:
    world.director.save("rebalance")
    assert (world.asked()["action"], world.asked()["saves"]) == ("go", 1)
    world.time = 100
    world.director.look()
    assert (world.asked()["action"], world.asked()["saves"]) == ("wait", 1)
    world.director.save("rebalance")
    assert (world.asked()["action"], world.asked()["saves"]) == ("wait", 2)
    world.director.stop("SIGTERM")
    before = world.asked()
    world.director.save("rebalance")
    assert world.asked() == before  # a stop saves


def test_advices_within_a_minute_are_one(world: World) -> None:
    for world.time in range(0, 121, 5):
        world.director.save(f"rebalance at {world.time}")
    assert world.asked()["saves"] == 3


@pytest.mark.parametrize("first", [None, 100])
def test_a_later_notice_shortens_the_time(world: World, first: float | None) -> None:
    assert world.director.stop("SIGTERM on node 1", first) is False
    assert world.director.look(first) is None
    world.time = 5
    assert world.director.look(20) is None
    assert world.director.deadline == 24
    world.time = 6
    assert world.director.look(90) is None
    assert world.director.deadline == 24
    world.time = 24
    assert "no time to save" in (world.director.look(1) or "")


def test_trainer_that_does_not_come_to_its_save_is_ended_in_time_for_the_commit(
    with_grace: Callable[[float | None], World],
) -> None:
    world = with_grace(30)
    world.saved("a", 1)
    world.committed("a", 10)
    assert world.director.stop("SIGTERM") is False
    world.time = 18.9  # 30 s, less one for the end, less ten for the commit
    assert world.director.look() is None
    world.time = 19
    assert "no time to save" in (world.director.look() or "")


def test_a_stop_is_never_taken_back(world: World) -> None:
    world.director.stop("SIGTERM")
    world.time = 1000
    world.director.look()
    assert world.asked()["action"] == "stop"


@pytest.mark.parametrize(("text", "seconds"), [(None, None), ("", None), ("30", 30.0), ("1.5", 1.5)])
def test_grace_of_the_environment(text: str | None, seconds: float | None) -> None:
    assert grace_seconds({} if text is None else {"RUNNER_GRACE_SECONDS": text}) == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "30s"])
def test_grace_that_is_no_number_of_seconds(text: str) -> None:
    with pytest.raises(JobError, match="RUNNER_GRACE_SECONDS"):
        grace_seconds({"RUNNER_GRACE_SECONDS": text})
