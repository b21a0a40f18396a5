"""Hangs: told by a clock that the tests turn, and a whole run whose trainer falls silent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.supervisor import attempt, ranks, watchdog
from runner.supervisor.attempt import Ended
from runner.supervisor.progress import PHASES
from runner.supervisor.ranks import Exit
from runner.supervisor.remains import last_error
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import Outcome
from runner.supervisor.watchdog import FLOOR, WAIT, Watchdog
from tests.machines import Bench, at

TICK = ranks.TICK
QUIET = f"no sign of life for {FLOOR:.0f} s"


class Time:
    """A clock that a test turns, and the dog that reads it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.dog = Watchdog(lambda: self.now)

    def passes(self, seconds: float, log: int = 0) -> str | None:
        """Seconds tick by as while a supervisor watches; the first complaint."""
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            said = self.dog.tick(log)
            if said is not None:
                return said
        return None

    def step(self, seconds: float, step: int = 1) -> None:
        self.dog.note({"event": "step", "step": step, "steps": 100, "seconds": seconds})


@pytest.fixture
def time() -> Time:
    return Time()


def phase(name: str) -> dict[str, Any]:
    return {"event": "phase", "phase": name}


@pytest.mark.parametrize("name", [None, *(name for name in PHASES if name != WAIT)])
def test_every_phase_has_its_ten_minutes_and_no_more(time: Time, name: str | None) -> None:
    if name is not None:
        time.dog.note(phase(name))
    assert time.passes(FLOOR - TICK) is None
    assert time.passes(TICK) == QUIET


def test_waiting_for_the_store_is_no_hang_and_what_follows_may_be(time: Time) -> None:
    time.dog.note(phase("train"))
    assert time.passes(500) is None
    time.dog.note(phase("wait"))
    assert time.passes(10 * FLOOR) is None
    time.dog.note(phase("train"))
    assert time.passes(FLOOR - TICK) is None
    assert time.passes(TICK) == QUIET


@pytest.mark.parametrize("event", [{"event": "warning"}, {"event": "garbage"}, phase("train")])
def test_any_event_is_a_sign_of_life(time: Time, event: dict[str, Any]) -> None:
    assert time.passes(FLOOR - TICK) is None
    time.dog.note(event)
    assert time.passes(FLOOR - TICK) is None
    assert time.passes(TICK) == QUIET


def test_a_log_that_grows_is_a_sign_of_life(time: Time) -> None:
    assert time.passes(FLOOR - TICK) is None
    assert time.passes(FLOOR, log=80) is None
    assert time.passes(TICK, log=80) == QUIET


@pytest.mark.parametrize(
    ("steps", "limit"),
    [
        ([], 600),
        ([1.0], 600),
        ([29.0, 31.0], 600),
        ([31.0], 620),
        ([60.0, 60.0, 900.0], 1200),
        ([500.0] + [1.0] * 20, 600),
        ([1.0] * 20 + [60.0] * 11, 1200),
    ],
)
def test_the_limit_follows_the_last_steps(time: Time, steps: list[float], limit: float) -> None:
    for seconds in steps:
        time.step(seconds)
    assert time.dog.limit == limit
    assert time.passes(limit - TICK) is None
    assert time.passes(TICK) == f"no sign of life for {limit} s"


def test_time_in_which_nobody_watched_does_not_count(time: Time) -> None:
    """A lid that was closed overnight, ten times."""
    for _ in range(10):
        time.now += 30_000
        assert time.dog.tick(0) is None
    assert time.passes(FLOOR - 10 * 4 * TICK - TICK) is None
    assert time.passes(TICK) == QUIET


def test_ticks_that_come_with_every_event_count_no_more_than_their_time(time: Time) -> None:
    for _ in range(10_000):
        time.now += 0.01
        assert time.dog.tick(0) is None
    assert time.passes(FLOOR - 100 - 2 * TICK) is None
    assert time.passes(4 * TICK) == QUIET


# --- what an attempt makes of it ---


def ended(
    end: Exit, log: Path, outcome: Outcome | None = None, near: bool = False, phase: str = "train"
) -> Ended:
    log.write_text("RuntimeError: earlier\n")
    return Ended(end, outcome, Seen(phase=phase, step=17), log, ended_for_memory=near)


def test_a_hang_is_a_crash_with_a_reason_and_no_signal(tmp_path: Path) -> None:
    why = f"hung: {QUIET} in step 17"
    one = ended(Exit(-9, why), tmp_path / "log")
    assert one.reason == why
    assert not one.out_of_memory
    assert one.message(2) == f"attempt 2 {why}; its last line: RuntimeError: earlier; log: {one.log}"
    crash = one.crash(2, progressed=False)
    assert (crash.step, crash.by_signal, crash.reason) == (17, False, why)


def test_a_last_word_counts_for_more_than_our_kill(tmp_path: Path) -> None:
    said = Outcome(outcome="failed", exit_code=1, error="row 3")
    assert ended(Exit(-9, "hung"), tmp_path / "log", said, near=True).reason == "row 3"
    assert not ended(Exit(-9, "hung"), tmp_path / "log", said, near=True).out_of_memory


def test_what_was_ended_near_the_limit_is_out_of_memory(tmp_path: Path) -> None:
    """Whatever phase its last events say: it was ended with a micro-batch in memory."""
    one = ended(Exit(-9, "at 97 % of the memory limit"), tmp_path / "log", near=True, phase="export")
    assert one.out_of_memory
    assert one.reason == "at 97 % of the memory limit"
    assert last_error(one.log) == "RuntimeError: earlier"


# --- a whole run ---


def impatient(bench: Bench) -> Callable[[], None]:
    """In the supervisor: time stands still, but for trainers that wait for their end."""

    def patch() -> None:
        now = [0.0]

        def clock() -> float:
            newest = max((bench.run / "attempts").iterdir(), key=lambda folder: int(folder.name))
            now[0] += 4 * TICK if (newest / "waiting").exists() else 0.0
            return now[0]

        ranks.TICK = 0.05
        watchdog.FLOOR = 10.0
        attempt.Watchdog = functools.partial(Watchdog, clock)  # type: ignore[misc]

    return patch


def test_a_trainer_that_falls_silent_is_ended_and_the_run_ends_the_same(tmp_path: Path) -> None:
    calm, bench = tmp_path / "calm", tmp_path / "hung"
    calm.mkdir()
    bench.mkdir()
    undisturbed, disturbed = Bench(calm), Bench(bench)
    assert undisturbed.train()[0] == 0
    code, output = disturbed.train(at("step:4", "linger"), before=impatient(disturbed))
    assert code == 0, output
    assert disturbed.weights() == undisturbed.weights()
    (restart,) = disturbed.result()["restarts"]
    assert restart["reason"] == "hung: no sign of life for 10 s in step 4"
    assert restart["step"] == 2
    assert "attempt 1 hung: no sign of life for 10 s in step 4; log: " in output


def test_two_hangs_in_one_step_are_no_progress_with_its_rows(bench: Bench) -> None:
    code, output = bench.train(at("step:4", "linger", attempt=None), before=impatient(bench))
    assert code == 93, output
    assert "step 4 failed twice, in attempts 1 and 2" in output
    assert "are 6, 7" in output


def test_two_hangs_in_one_phase_are_the_end(bench: Bench) -> None:
    code, output = bench.train(at("load", "linger", attempt=None), before=impatient(bench))
    assert code == 1, output
    assert "attempts 1 and 2 failed outside training with hung: no sign of life for 10 s" in output
