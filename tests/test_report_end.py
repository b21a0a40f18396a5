"""The report that a run leaves when it ends, by the real supervisor; the trainer is tests/fake_rank.py."""

from __future__ import annotations

import os
import signal

import pytest

from tests.machines import Bench, at
from tests.terminal import piped

pytestmark = pytest.mark.usefixtures("on")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_REPORT", "on")


def text(bench: Bench) -> str:
    return (bench.run / "report.html").read_text("utf-8")


def test_a_run_that_is_done_leaves_one(bench: Bench) -> None:
    code, output = bench.train()
    assert code == 0, output
    assert output.rstrip().endswith("\nreport: runs/bench/report.html")
    assert "next: " in output and " report runs/bench" not in output, "it is there already"
    assert "Step 6 of 6." in text(bench) or "rose from 0.25 to 0.75" in text(bench)


def test_a_preempted_one_says_how_to_go_on_and_the_end_of_the_run_replaces_it(bench: Bench) -> None:
    command = bench.start(at("step:4", "wait"))
    bench.wait_for(bench.waiting(), command)
    command.send(signal.SIGTERM)
    code, output = command.finish()
    assert code == 75, output
    assert "Stopped, state saved" in text(bench) and "SIGTERM" in text(bench)
    assert bench.train()[0] == 0
    assert "Preempted</b> at step" in text(bench) and "Stopped, state saved" not in text(bench)


def test_a_failed_one_says_why_and_what_to_do(bench: Bench) -> None:
    assert bench.train(at("step:3", "full", attempt=None), above=0)[0] == 1
    page = text(bench)
    assert "What went wrong" in page and "a micro-batch of a single row does not fit" in page
    assert "What to do" in page and "a lora section" in page


def test_one_that_cannot_be_written_is_a_warning(bench: Bench) -> None:
    """A folder lies where it should be."""
    (bench.run / "report.html" / "something").mkdir(parents=True)
    code, output = bench.train()
    assert code == 0, output
    assert bench.result()["outcome"] == "done"
    assert "warning: no report was written: write the report: " in output
    code, out, _ = piped(bench, ["train", "job.yaml", "--quiet"])
    assert code == 0 and b"warning: no report was written: " in out, "a warning is not quiet"
    assert "`runner report runs/bench` makes it" in output


def test_one_that_crashes_is_a_warning(bench: Bench) -> None:
    """A package that is not ours stands before jinja2 in the process that makes the report."""
    broken = bench.path / "broken"
    (broken / "jinja2").mkdir(parents=True)
    (broken / "jinja2" / "__init__.py").write_text("raise RuntimeError('no luck')\n")
    path = os.environ.get("PYTHONPATH", "")

    def before() -> None:
        os.environ["PYTHONPATH"] = f"{broken}{os.pathsep}{os.environ['PYTHONPATH']}"

    code, output = bench.train(before=before)
    assert os.environ.get("PYTHONPATH", "") == path
    assert code == 0, output
    assert "warning: no report was written: RuntimeError: this is a defect of vlm-runner" in output


def test_none_where_nobody_wants_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_REPORT", "off")
    code, output = bench.train()
    assert code == 0 and "report: " not in output and " report runs/bench" in output
    assert not (bench.run / "report.html").exists()
