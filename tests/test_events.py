"""Events, the screen and the record: nothing that a pipe, a file or a terminal does stops a run."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner import events
from runner.events import LONGEST, EventLog, LineReader
from runner.supervisor import result
from runner.supervisor.journal import Journal
from runner.supervisor.progress import change_lines, duration, metric_lines
from runner.supervisor.screen import Screen

ROOT = Path(__file__).parents[1]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- the file ---


def test_log_stamps_time_and_attempt(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    with EventLog(path, clock) as log:
        log.write({"event": "start"})
        log.attempt, clock.now = 3, 101.5
        log.write({"event": "phase", "phase": "load"})
    assert list(events.read(path)) == [
        {"time": 100.0, "attempt": 0, "event": "start"},
        {"time": 101.5, "attempt": 3, "event": "phase", "phase": "load"},
    ]


def test_log_goes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "a"}\n{"event": "b", "wh')
    with EventLog(path, Clock()) as log:
        log.write({"event": "c"})
    assert [event["event"] for event in events.read(path)] == ["a", "c"]


def test_reading_passes_over_what_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\x00\xff\n[]\n{"event": 3}\n\n{"event": "a"}\n' + b"[" * 100_000 + b'\n{"event": "b"}')
    assert [event["event"] for event in events.read(path)] == ["a", "b"]
    assert list(events.read(tmp_path / "none")) == []


# --- the pipe ---


def feed(*pieces: bytes) -> list[dict[str, Any]]:
    reader = LineReader()
    found = [event for piece in pieces for event in reader.feed(piece)]
    return [*found, *reader.close()]


def test_reader_joins_pieces() -> None:
    line = b'{"event": "message", "text": "\xc3\xa4"}\n{"event": "b"}\n'
    assert feed(*(bytes([byte]) for byte in line)) == [{"event": "message", "text": "ä"}, {"event": "b"}]


def test_reader_survives_garbage_half_lines_and_huge_lines() -> None:
    found = feed(
        b"\x00\xffnoise\n\n", b"x" * LONGEST, b"y" * LONGEST + b'\n{"event": "a"}\n', b'{"event": "b"'
    )
    assert [event["event"] for event in found] == ["garbage", "garbage", "a", "garbage"]
    assert found[1]["bytes"] == 2 * LONGEST
    assert len(found[1]["text"]) <= 200


@pytest.mark.parametrize(
    "event",
    [
        {"event": "step", "step": 1},
        {"event": "step", "step": "1", "steps": 2, "loss": 0.5, "tokens": 1, "images": 1, "seconds": 1},
        {"event": "checkpoint", "step": 1},
        {"event": "phase"},
        {"event": "progress", "phase": "x", "done": 1, "total": None},
    ],
)
def test_an_event_without_its_fields_is_garbage(event: dict[str, Any]) -> None:
    assert [one["event"] for one in feed(json.dumps(event).encode() + b"\n")] == ["garbage"]


# --- the record ---


def test_record_adds_up_attempts_and_survives_a_clock_set_back() -> None:
    record = result.Record()
    for event in [
        {"event": "start", "attempt": 0, "time": 0.0},
        {"event": "attempt", "attempt": 1, "time": 10.0},
        {"event": "evaluation", "attempt": 1, "time": 12.0, "when": "before", "metrics": {"m": 1}},
        {"event": "evaluation", "attempt": 1, "time": 12.0, "when": "during", "metrics": {"m": 2}},
        {"event": "restart", "attempt": 2, "time": 50.0, "reason": "SIGKILL", "step": 4},
        {"event": "attempt", "attempt": 2, "time": 50.0},
        {"event": "step", "attempt": 2, "time": 53.5},
        {"event": "attempt", "attempt": 3, "time": 60.0},
        {"event": "step", "attempt": 3, "time": 1.0},
    ]:
        record.note(event)
    assert record.seconds == 5.5
    assert record.restarts == [{"attempt": 2, "reason": "SIGKILL", "step": 4, "per_device": None}]
    assert record.metrics == {"before": {"m": 1}, "after": None}
    assert record.last == {"event": "attempt", "outcome": None, "error": None}
    assert record.attempts == 3


def test_record_goes_on_from_head_and_from_what_this_machine_did_since(tmp_path: Path) -> None:
    """`HEAD` is swapped now and then; the events file of the same machine knows the rest."""
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:

        def journal() -> Journal:
            return Journal(log, Screen(io.StringIO()), lambda: None)

        first = journal()
        first.say({"event": "attempt"})
        kept = first.snapshot()
        first.say({"event": "restart", "reason": "SIGKILL"})
        here, elsewhere = journal(), journal()
        here.resume(kept, True, path)
        elsewhere.resume(kept, False, path)
        assert [one["reason"] for one in here.record.restarts] == ["SIGKILL"]
        here.say({"event": "restart", "reason": "again"})
    assert [one["reason"] for one in here.snapshot()["restarts"]] == ["SIGKILL", "again"]
    assert elsewhere.record.restarts == []


# --- the screen ---


def step(number: int, steps: int = 100) -> dict[str, Any]:
    numbers = {"loss": 0.5, "tokens": 1500, "images": 3, "seconds": 0.5, "memory_bytes": 3 << 29}
    return {"event": "step", "step": number, "steps": steps, **numbers}


def test_lines_are_limited_to_first_tenths_ten_seconds_and_last() -> None:
    clock, out = Clock(), io.StringIO()
    screen = Screen(out, clock)
    for number in range(1, 101):
        clock.now += 12.0 if number == 55 else 0.1
        screen.show(step(number))
    lines = out.getvalue().splitlines()
    shown = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert shown == [1, 10, 20, 30, 40, 50, 55, 60, 70, 80, 90, 100]
    assert lines[0] == "step 1/100  loss 0.5000  3,000 tokens/s  6.0 images/s  1.50 GiB  ETA 0:50"
    assert lines[-1] == "step 100/100  loss 0.5000  3,000 tokens/s  6.0 images/s  1.50 GiB"


def test_lines_of_phases_audit_and_evaluation() -> None:
    out = io.StringIO()
    screen = Screen(out, Clock())
    metrics = {"relaxed_accuracy": {"overall": 0.929, "n": 240, "human": 0.91, "n_human": 120}}
    for event in [
        {"event": "phase", "phase": "data"},
        {"event": "audit", "lines": ["[bold]row 0[/bold]: \x1b[2J14"]},
        {"event": "phase", "phase": "train"},
        {"event": "phase", "phase": "save"},
        {"event": "phase", "phase": "train"},
        {"event": "progress", "phase": "evaluate_after", "done": 240, "total": 240},
        {"event": "evaluation", "when": "after", "metrics": metrics},
        {"event": "nobody knows it"},
    ]:
        screen.show(event)
    assert out.getvalue().splitlines() == [
        "preparing the data",
        "[bold]row 0[/bold]: �[2J14",
        "training",
        "evaluating after training 240/240",
        "after: relaxed accuracy 0.93 (n=240; human 0.91)",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


DRAWN = """
from tests.test_events import Clock, Screen, Terminal, step
out = Terminal()
screen = Screen(out, Clock())
screen.show({"event": "phase", "phase": "train"})
screen.show(step(7))
screen.line("a line above it")
screen.tick()
screen.close()
print(repr(out.getvalue()))
"""


@pytest.mark.parametrize("no_color", [False, True])
def test_terminal_has_a_bar_and_no_color_means_none(no_color: bool) -> None:
    """In a process of its own: Rich keeps a style's codes from the first use in its process."""
    environment = {**os.environ, "TERM": "xterm-256color", **({"NO_COLOR": "1"} if no_color else {})}
    command = [sys.executable, "-c", DRAWN]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    picture = ast.literal_eval(done.stdout)
    assert "7/100" in picture
    assert "loss 0.5000" in picture
    assert "a line above it" in picture
    assert ("\x1b[38;5;" in picture) is not no_color


def test_a_reader_that_leaves_costs_the_display_only() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        screen = Screen(out, Clock())
        for number in range(1, 101):
            screen.show(step(number))
        screen.line("more")
        screen.close()
        out.write("what Python flushes at exit")


def test_a_full_or_closed_output_costs_the_display_only() -> None:
    with Path("/dev/full").open("w") as out:
        Screen(out, Clock()).line("no room")
    out_closed = io.StringIO()
    screen = Screen(out_closed, Clock())
    out_closed.close()
    screen.line("nobody")


def test_metrics_as_people_read_them() -> None:
    before = {"relaxed_accuracy": {"overall": 0.21, "n": 240}, "loss": 1.5}
    after = {"relaxed_accuracy": {"overall": 0.93, "n": 240}, "exact_match": {"overall": None, "n": 0}}
    assert change_lines(before, after) == [
        "relaxed accuracy  0.21 -> 0.93  (n=240)",
        "loss              1.50 -> -",
        "exact match       - -> -  (n=0)",
    ]
    assert change_lines(None, None) == []
    half = {"overall": 0.5, "n": 240, "low": 0.437, "high": 0.563, "length_normalized": 0.5}
    most = {"overall": 0.97, "n": 240, "low": 0.94, "high": 0.985, "length_normalized": 0.97}
    pairs = {"preference_accuracy": half, "reward_accuracy": None}, {"preference_accuracy": most}
    assert change_lines(*pairs) == [
        "preference accuracy  0.50 [0.44, 0.56] -> 0.97 [0.94, 0.98]  (n=240)",
        "reward accuracy      - -> -",
    ]
    assert metric_lines(pairs[0]) == ["preference accuracy 0.50 [0.44, 0.56] (n=240)"]
    assert metric_lines(before) == ["relaxed accuracy 0.21 (n=240)", "loss 1.50"]
    assert [duration(one) for one in (5.4, 65, 3750)] == ["0:05", "1:05", "1:02:30"]
