"""The terminal of `runner train` and `runner evaluate`, as people and programs have it: what is shown, and
where; on pseudo-terminals of several widths and kinds, and on none."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from runner import __main__
from runner.again import again
from runner.command import program
from runner.settings import resolve
from runner.supervisor.opening import opening
from runner.supervisor.progress import near
from runner.supervisor.screen import fitted
from runner.supervisor.world import Machine, Placement
from tests.machines import Bench, at
from tests.terminal import Terminal, piped

TRAIN = ["train", "job.yaml"]

VERDICT = [
    "relaxed accuracy  0.25 -> 0.75  (n=4)",
    r"done: 6 steps in \d:\d\d, 1 attempt; runs/bench/adapter",
]

NEXT = [
    "next: python -m runner report runs/bench",
    "      python -m runner export runs/bench --to bench-export",
]


def matches(lines: list[str], patterns: list[str]) -> bool:
    found = (
        re.fullmatch(re.escape(p) if p in (VERDICT[0], *NEXT) else p, line)
        for p, line in zip(patterns, lines, strict=True)
    )
    return all(found)


# --- on a terminal ---


def test_a_terminal_has_a_bar_between_the_opening_and_the_verdict(bench: Bench) -> None:
    with Terminal(bench, TRAIN, at("step:4", "wait")) as terminal:
        while "3/6" not in terminal.output:
            assert terminal.read(), terminal.output
        assert "runs/bench/checkpoints; a lost machine costs at most 2m" in terminal.output
        (bench.run / "stop").touch()
        assert terminal.finish() == 75
    assert any(re.match(r"training +━.* 3/6 loss 0.3333", row) for row in terminal.rows)
    assert terminal.output.startswith("bench: sft of ")
    assert terminal.rows[-1] == "    next: python -m runner train job.yaml"
    assert max(map(len, [row for row in terminal.rows if row.startswith("training")])) < 80
    with Terminal(bench, [*TRAIN, "training.logging_steps=9"]) as terminal:
        assert terminal.finish() == 0
    assert any(row.startswith("attempt 2 goes on from checkpoint") for row in terminal.rows)
    assert matches(terminal.rows[-4:], [VERDICT[0], VERDICT[1].replace("1 attempt", "2 attempts"), *NEXT])
    assert "             command line: training.logging_steps=9" in terminal.rows


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_has_one_line_that_fits(bench: Bench, columns: int) -> None:
    with Terminal(bench, TRAIN, columns=columns, environ={"NO_COLOR": "1"}) as terminal:
        assert terminal.finish() == 0
    drawn = [row for row in terminal.rows if re.match(r"train.*\d/6", row)]
    assert drawn and max(map(len, drawn)) < columns
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.output)


def test_a_dumb_terminal_has_lines(bench: Bench) -> None:
    with Terminal(bench, TRAIN, environ={"TERM": "dumb"}) as terminal:
        assert terminal.finish() == 0
    assert "\x1b" not in terminal.output
    assert any(row.startswith("step 6/6  loss 0.1667") for row in terminal.rows)


def test_a_terminal_that_goes_away_stops_the_run_and_its_state_is_kept(bench: Bench) -> None:
    with Terminal(bench, TRAIN, at("step:4", "wait")) as terminal:
        while "3/6" not in terminal.output:
            assert terminal.read(), terminal.output
        terminal.hang_up()  # SIGHUP, and from then on nothing can be shown
        assert terminal.code() == 75
    assert bench.result()["outcome"] == "preempted" and bench.result()["steps"] == 4


# --- without one ---


def test_no_terminal_has_plain_lines(bench: Bench) -> None:
    code, out, err = piped(bench, TRAIN, environ={"FORCE_COLOR": "1"})
    assert (code, err) == (0, "") and b"\x1b" not in out and b"\r" not in out
    lines = out.decode().splitlines()
    assert "6 steps of 8 rows (8 rows at once), 12 rows in all" in lines
    assert matches(lines[-4:], [*VERDICT, *NEXT])


def test_quiet_is_the_verdict_alone(bench: Bench) -> None:
    code, out, err = piped(bench, [*TRAIN, "--quiet"])
    assert (code, err) == (0, "") and matches(out.decode().splitlines(), VERDICT)
    code, out, err = piped(bench, ["evaluate", "job.yaml", "--quiet"])
    assert (code, out, err) == (0, b"relaxed accuracy 0.75 (n=4; human 0.75)\n", "")


def test_quiet_tells_what_went_wrong(bench: Bench) -> None:
    code, out, err = piped(bench, [*TRAIN, "--quiet"], at("step:3", "kill"), at("step:5", "crash:65", 2))
    assert code == 65
    (said,) = out.decode().splitlines()
    assert said.startswith("attempt 1 ended in step 3 with SIGKILL")
    *reason, line = err.splitlines()
    assert "of data is bad, says 65" in "\n".join(reason)
    assert line == "    next: mend that, or edit job.yaml, then: python -m runner train job.yaml --quiet"


def test_json_is_the_events_and_nothing_else(bench: Bench) -> None:
    code, out, err = piped(bench, [*TRAIN, "--json"], at("step:3", "kill"))
    assert (code, err) == (0, "")
    assert out == (bench.run / "events.jsonl").read_bytes()
    told = [json.loads(line)["event"] for line in out.splitlines()]
    assert told[-1] == "end" and {"step", "commit", "restart", "evaluation"} <= set(told)
    code, out, err = piped(bench, [*TRAIN, "--json"])
    assert (code, err) == (0, "")
    (end,) = [json.loads(line) for line in out.splitlines()]
    assert (end["event"], end["outcome"], end["exit_code"]) == ("end", "done", 0)


def test_json_of_an_evaluation(bench: Bench) -> None:
    code, out, err = piped(bench, ["evaluate", "job.yaml", "--json"])
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert {"event", "time", "attempt"} <= set(events[0])
    assert events[-1]["event"] == "evaluation" and "relaxed_accuracy" in events[-1]["metrics"]


def test_json_of_a_failure_says_why_on_stderr(bench: Bench) -> None:
    code, out, err = piped(bench, [*TRAIN, "--json", "lora.r=0"])
    assert (code, out) == (78, b"") and "lora.r" in err
    assert err.splitlines()[-1].startswith(
        "    next: edit job.yaml, then: python -m runner train job.yaml --json"
    )


# --- rules ---


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (100, ("training", 24, "loss 0.5  900 tokens/s  1.5 GiB  ETA 0:50")),
        (64, ("training", 8, "loss 0.5  900 tokens/s  1.5 GiB  ETA 0:50")),
        (60, ("training", 13, "loss 0.5  900 tokens/s  ETA 0:50")),
        (52, ("training", 19, "loss 0.5  ETA 0:50")),
        (40, ("training", 0, "loss 0.5  ETA 0:50")),
        (30, ("training", 0, "loss 0.5")),
        (20, ("training", 0, "")),
        (10, ("train", 0, "")),
    ],
)
def test_what_a_line_keeps(width: int, line: tuple[str, int, str]) -> None:
    details = ["loss 0.5", "900 tokens/s", "1.5 GiB", "ETA 0:50"]
    found = fitted("training", "5/9", details, width)
    assert found == line
    parts = (found[0], "x" * found[1], "5/9", found[2])
    assert len(" ".join(part for part in parts if part)) < width


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (75, "    next: runner train 'my job.yaml' a=1"),
        (74, "    next: runner train 'my job.yaml' a=1"),
        (78, "    next: edit my job.yaml, then: runner train 'my job.yaml' a=1"),
        (65, "    next: mend that, or edit my job.yaml, then: runner train 'my job.yaml' a=1"),
        *((code, None) for code in (1, 64, 76, 77, 93)),
    ],
)
def test_what_to_type_after_a_failure(code: int, line: str | None) -> None:
    assert again(code, "runner", ["train", "my job.yaml", "a=1"], "my job.yaml") == line


def test_the_program_is_named_as_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "runner"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program(str(script)) == "runner"
    monkeypatch.setenv("PATH", "")
    assert program(str(script)) == str(script)
    assert program(str(Path(__main__.__file__))) == "python -m runner"
    assert program("/usr/bin/pytest") == "runner"


def said(tmp_path: Path, machine: Machine, *overrides: str, **environ: str) -> dict[str, str]:
    job = tmp_path / "job.yaml"
    source: dict[str, Any] = {"path": "demo:charts", "format": "vqa"}
    job.write_text(
        json.dumps({"name": "x", "model": {"name_or_path": "a/b"}, "datasets": {"train": [source]}})
    )
    resolved = resolve(str(job), list(overrides), environ)
    cards = tmp_path / "gpus" / "0000:01:00.0"
    cards.mkdir(parents=True, exist_ok=True)
    (cards / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 5\n")
    lines = opening(resolved, tmp_path / "runs" / "x", machine, Placement(2, "ddp"), tmp_path / "gpus")
    assert lines[0] == "x: sft of a/b"
    return {line[:12].strip(): line[13:] for line in lines[1:]}


def test_the_opening_says_what_was_resolved_and_from_where(tmp_path: Path) -> None:
    lines = said(
        tmp_path,
        Machine(2, 8),
        *("quantization.load_in_4bit=true", "lora.r=4", "checkpoints.uri=s3://bucket/runs"),
        JOB__TRAINING__LEARNING_RATE="1e-5",
    )
    assert lines == {
        "job": f"{tmp_path}/job.yaml\n             command line: quantization.load_in_4bit=True lora.r=4 "
        "checkpoints.uri=s3://bucket/runs\n             environment: training.learning_rate=1e-05",
        "base": "4-bit fp4, computes in bfloat16; frozen: vision_tower, projector",
        "adapter": "LoRA r=4, alpha 8, on all-linear",
        "data": "demo:charts[train] as vqa, 8 rows a step",
        "evaluation": "none",
        "machine": "2 x NVIDIA H200, 8 CPU cores; 2 processes (ddp)",
        "checkpoints": "s3://bucket/runs/x; a lost machine costs at most 2m",
    }
    assert said(tmp_path, Machine(0, 1))["machine"].startswith("1 CPU core, no GPU; ")


def test_a_stop_by_hand_says_what_to_type(bench: Bench) -> None:
    with Terminal(bench, [*TRAIN, "--quiet"], at("step:4", "wait")) as terminal:
        bench.wait_for(bench.waiting())
        os.kill(terminal.pid, signal.SIGINT)
        assert terminal.finish() == 75
    assert terminal.rows[-1] == "    next: python -m runner train job.yaml --quiet"


def test_a_path_is_named_also_where_the_current_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert near(tmp_path / "gone" / "runs" / "a") == "runs/a"
    (tmp_path / "gone").rmdir()
    assert near(tmp_path / "gone" / "runs" / "a") == str(tmp_path / "gone" / "runs" / "a")
