"""The rules of tracking, without a tracker: what is asked for, how numbers are called, what is told when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.events import EventLog
from runner.job.check import check
from runner.tracking import choice
from runner.tracking.feed import Feed
from runner.tracking.request import environ_of
from runner.tracking.rows import Row, flat, fresh
from tests.small_job import with_value


@pytest.mark.parametrize(
    ("report_to", "asked", "unknown"),
    [
        (None, [], []),
        ("none", [], []),
        ([], [], []),
        (["none"], [], []),
        ("wandb", ["wandb"], []),
        (["mlflow", "wandb"], ["mlflow", "wandb"], []),
        (["wandb", "wandb"], ["wandb"], []),
        ("all", ["all"], ["all"]),
        (["wandb", "comet_ml"], ["wandb", "comet_ml"], ["comet_ml"]),
        (["none", "wandb"], ["wandb"], ["none"]),
    ],
)
def test_words_of_report_to(report_to: Any, asked: list[str], unknown: list[str]) -> None:
    assert choice.asked(report_to) == asked
    assert choice.unknown(report_to) == unknown


@pytest.mark.parametrize(
    ("report_to", "remedy"),
    [
        ("all", "name them: a list of tensorboard, wandb, mlflow, trackio"),
        ("wandbb", "did you mean wandb?"),
        (["tensorboard", "neptune"], "the trackers are tensorboard, wandb, mlflow, trackio, or none"),
        (["none", "wandb"], "remove it"),
    ],
)
def test_a_word_that_is_no_tracker_is_refused_with_the_names(report_to: Any, remedy: str) -> None:
    job, (finding,) = check(with_value("training.report_to", report_to), {})
    assert job is None and finding.path == ("training", "report_to")
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    "key", ["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "wandb_project"]
)
def test_what_a_tracker_is_told_otherwise_has_an_answer(key: str) -> None:
    job, (finding,) = check(with_value(f"training.{key}", "me"), {})
    assert job is None and "training." in finding.remedy


def test_metrics_have_one_name_each() -> None:
    metrics = {"eval_loss": 0.4, "accuracy": {"overall": 0.9, "n": 4, "x": 1, "n_x": 2}, "margin": None}
    expected = {"eval/loss": 0.4, "eval/accuracy": 0.9, "eval/accuracy_x": 1, "eval/margin": None}
    assert flat(metrics, "eval/") == expected


def test_rows_that_are_known_or_twice_are_left_out_by_metric() -> None:
    rows = [Row(2, {"a": 2.0, "b": 2.0}), Row(1, {"a": 1.0}), Row(2, {"a": 9.0, "c": 3.0})]
    assert fresh(rows, {"a": {1}, "b": {2}}) == [Row(2, {"a": 2.0}), Row(2, {"c": 3.0})]


ENVIRON = {
    "WANDB_API_KEY": "w",
    "WANDB_ENTITY": "us",
    "MLFLOW_TRACKING_URI": "m",
    "DATABRICKS_TOKEN": "d",
    "AWS_PROFILE": "a",
    "HF_TOKEN": "h",
    "MY_PASSWORD": "p",
    "TRACKIO_SPACE_ID": "s",
    "PATH": "/bin",
}


@pytest.mark.parametrize(
    ("tracker", "kept"),
    [
        ("tensorboard", {"PATH"}),
        ("wandb", {"PATH", "WANDB_API_KEY", "WANDB_ENTITY"}),
        ("mlflow", {"PATH", "MLFLOW_TRACKING_URI", "DATABRICKS_TOKEN", "AWS_PROFILE"}),
        ("trackio", {"PATH"}),
    ],
)
def test_a_tracker_has_no_credentials_but_its_own(tmp_path: Path, tracker: str, kept: set[str]) -> None:
    found = environ_of(tracker, ENVIRON, tmp_path)
    assert {name for name in ENVIRON if found.get(name) == ENVIRON[name]} == kept
    assert found["DO_NOT_TRACK"] == "1"


class Run:
    """The files of a run that a feed reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "newest").mkdir()
        self.log = EventLog(path / "events.jsonl", clock=lambda: 100.0)
        self.feed = Feed(path, batch=8, before=None)

    def commit(self, steps: int, name: str | None = None) -> None:
        for old in (self.path / "newest").iterdir():
            old.rename(self.path / f"gone-{old.name}")
        folder = self.path / "newest" / (name or f"{steps:08d}")
        folder.mkdir()
        lines = [
            {
                "step": step,
                "loss": step / 2,
                "grad_norm": None,
                "learning_rate": 0.1,
                "tokens": 5,
                "images": 1,
            }
            for step in range(1, steps + 1)
        ]
        (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def say(self, event: str, **fields: Any) -> None:
        self.log.write({"event": event, **fields})

    def look(self) -> list[tuple[int, dict[str, float]]]:
        return [(row.step, row.values) for row in self.feed.look()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    with run.log:
        yield run


def test_a_step_is_told_when_it_is_committed_and_not_before(run: Run) -> None:
    run.say("plan", rows=16, steps=4)
    run.say("step", step=1, seconds=0.5)
    assert run.look() == []
    run.commit(2, "00000002.partial")  # is being restored
    assert run.look() == []
    run.commit(2)
    common = {"train/learning_rate": 0.1, "train/tokens": 5.0, "train/images": 1.0}
    assert run.look() == [
        (1, {"train/loss": 0.5, **common, "train/epoch": 0.5, "train/seconds": 0.5}),
        (2, {"train/loss": 1.0, **common, "train/epoch": 1.0}),
    ]
    assert run.look() == []
    run.commit(1)  # the newest was damaged: the run goes back
    assert run.look() == []
    run.commit(3)
    assert [step for step, _ in run.look()] == [3]


def test_on_a_new_machine_steps_wait_for_the_length_of_an_epoch(run: Run) -> None:
    run.commit(2)  # fetched before the trainer starts
    assert run.look() == []
    run.say("plan", rows=16, steps=4)
    assert [(step, values["train/epoch"]) for step, values in run.look()] == [(1, 0.5), (2, 1.0)]


def test_where_no_trainer_came_to_a_plan_the_end_tells_what_is_there(run: Run) -> None:
    run.commit(2)
    run.say("end", outcome="failed", exit_code=65, error="bad data")
    assert [step for step, _ in run.look()] == [1, 2]


def test_an_evaluation_of_steps_that_were_lost_is_not_told(run: Run) -> None:
    run.say("plan", rows=16, steps=4)
    run.commit(2)
    run.look()
    run.say("evaluation", when="during", step=2, metrics={"eval_loss": 0.2})
    run.say("evaluation", when="during", step=3, metrics={"eval_loss": 0.3})
    run.say("attempt", restore="00000002", step=2)
    run.say("evaluation", when="during", step=4, metrics={"eval_loss": 0.4})
    run.commit(4)
    assert [row for row in run.look() if "train/loss" not in row[1]] == [
        (2, {"eval/loss": 0.2}),
        (4, {"eval/loss": 0.4}),
    ]


def test_an_evaluation_is_told_when_its_step_is_committed(run: Run) -> None:
    run.say("plan", rows=16, steps=4)
    run.say("evaluation", when="before", step=0, metrics={"accuracy": 0.1})
    run.say("evaluation", when="during", step=2, metrics={"eval_loss": 0.3})
    assert run.look() == [(0, {"eval/accuracy": 0.1})]
    (run.path / "evaluations.jsonl").write_text('{"step": 1, "metrics": {"eval_loss": 0.4}, "best": true}\n')
    run.commit(2)
    assert [row for row in run.look() if "train/loss" not in row[1]] == [
        (2, {"eval/loss": 0.3}),
        (1, {"eval/loss": 0.4}),  # on another machine
    ]


def test_the_end_of_an_earlier_command_is_not_the_end_of_this_one(run: Run) -> None:
    run.say("evaluation", when="before", step=0, metrics={"accuracy": {"overall": 0.1, "n": 3}})
    run.say("end", outcome="preempted", exit_code=75, error="SIGTERM")
    run.look()
    assert run.feed.ending is not None and run.feed.ending.exit_code == 75
    run.say("start", versions={})
    run.look()
    assert run.feed.ending is None
    run.say("end", outcome="done", exit_code=0, error=None)
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "end", "outco')  # a kill
    run.look()
    assert run.feed.ending is not None
    assert (run.feed.ending.outcome, run.feed.ending.summary) == ("done", {"before/accuracy": 0.1})
