"""A run that overfits on purpose: it stops early, and exports what was best, however often it was killed.

Real processes and real SIGKILLs at named points (`tests/killpoint`). What has to come out is known without
any of it: a run that simply trains as many steps as the best had.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from runner import cli
from runner.errors import DataError
from runner.export import build
from runner.manifest import Evaluation, Job
from runner.plan import Strategy
from runner.planning.numbers import evaluations as evaluations_planned
from runner.request import Request, write
from runner.train.evaluation.history import Standing, standing, value_of
from runner.train.watch import BEST, Watch
from tests import warm
from tests.attempts import JOB, merged, pairs, run, run_ranks

# --- the rules ---

NOTHING = Standing(None, 0)


@pytest.mark.parametrize(
    ("values", "larger", "threshold", "expected"),
    [
        ([], True, 0.0, NOTHING),
        ([0.2, 0.5, 0.4, 0.5], True, 0.0, Standing(1, 2)),
        ([0.2, 0.5, 0.4, 0.3], False, 0.0, Standing(0, 3)),
        ([0.50, 0.52, 0.54], True, 0.03, Standing(2, 2)),
        ([0.50, 0.52, 0.58], True, 0.03, Standing(2, 0)),
        ([None, 0.5, None], True, 0.0, Standing(1, 1)),
        ([None, None], True, 0.0, Standing(None, 2)),
        ([float("nan"), 2.0, 1.0], False, 0.0, Standing(2, 0)),
    ],
)
def test_the_best_and_how_long_ago_it_was(
    values: list[float | None], larger: bool, threshold: float, expected: Standing
) -> None:
    assert standing(values, larger=larger, threshold=threshold) == expected


def test_a_metric_is_its_number_over_all_rows() -> None:
    metrics = {"relaxed_accuracy": {"overall": 0.5, "n": 4}, "reward_accuracy": None, "eval_loss": 2.0}
    assert value_of(metrics, "relaxed_accuracy") == 0.5
    assert value_of(metrics, "reward_accuracy") is None
    assert value_of(metrics, "exact_match") is None
    assert value_of(metrics, "loss") == 2.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(folder: Path, clock: Clock, restore: Path | None = None, **spec: Any) -> Watch:
    folder.mkdir(exist_ok=True)
    record = folder / "evaluations.jsonl"
    return Watch(Evaluation(**spec), attempt_dir=folder, record=record, restore=restore, clock=clock)


def test_when_an_evaluation_is_due(tmp_path: Path) -> None:
    def due(**spec: Any) -> list[int]:
        one = watch(tmp_path, Clock(), **spec)
        return [step for step in range(1, 13) if one.due(step, 12)]

    assert due() == []
    assert due(steps=5) == [5, 10]
    assert due(steps=5, metric_for_best_model="loss") == [5, 10, 12]
    assert due(minutes=10) == []


def test_minutes_count_training_through_an_interruption(tmp_path: Path) -> None:
    clock = Clock()
    first = watch(tmp_path / "1", clock, minutes=1.0)
    clock.now = 59.0
    assert not first.due(7, 12)
    saved = tmp_path / "saved"
    saved.mkdir()
    first.write(saved)
    clock.now = 5000.0
    second = watch(tmp_path / "2", clock, saved, minutes=1.0)
    assert not second.due(8, 12)
    clock.now += 1.0
    assert second.due(9, 12)
    second.take(9, {})
    assert not second.due(10, 12)


def test_what_lost_steps_had_told_is_written_over(tmp_path: Path) -> None:
    first = watch(tmp_path, Clock(), steps=2)
    first.take(2, {"eval_loss": 1.0})
    watch(tmp_path, Clock(), steps=2)  # nothing was committed
    assert (tmp_path / "evaluations.jsonl").read_text() == ""
    watch(tmp_path / "never", Clock(), steps=2)
    assert not (tmp_path / "never" / "evaluations.jsonl").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"seconds": 1, "evaluations": [{"step": true, "metrics": {}, "best": true}]}',
        '{"seconds": 1, "evaluations": [{"step": 1, "metrics": [], "best": true}]}',
        '{"seconds": NaN, "evaluations": []}',
        '{"seconds": 1, "evaluations": [{"step": 2, "metrics": {}, "best": false}, '
        '{"step": 2, "metrics": {}, "best": false}]}',
        '{"seconds": 1, "evaluations": [{"step": 1, "metrics": {"x": '
        f"{'[' * 600}{']' * 600}"
        '}, "best": true}]}',
    ],
)
def test_evaluations_that_no_run_saved_are_named(content: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "evaluations.json").write_text(content)
    with pytest.raises(DataError, match=r"checkpoint saved: evaluations\.json is not what a run saves"):
        watch(tmp_path / "run", Clock(), saved, steps=2)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, 0),
        ({}, 0),
        ({"steps": 30}, 3),
        ({"steps": 50}, 1),
        ({"steps": 30, "metric_for_best_model": "loss"}, 4),
        ({"steps": 50, "metric_for_best_model": "loss"}, 2),
        ({"minutes": 1.0}, None),
    ],
)
def test_a_plan_counts_the_evaluations(
    spec: dict[str, Any] | None, expected: int | None, tmp_path: Path
) -> None:
    job = Job.model_validate(merged(JOB, {"evaluation": spec}))
    assert evaluations_planned(job, 100) == expected
    if spec is not None and expected is not None:
        one = watch(tmp_path, Clock(), **spec)
        assert sum(one.due(step, 100) for step in range(1, 101)) == expected


# --- real runs ---

SOURCE = JOB["datasets"]["train"][0]
OVERFITS = merged(
    JOB,
    {
        "name": "overfits",
        "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
        "datasets": {"train": [SOURCE], "eval": [{**SOURCE, "split": "test[:8]"}]},
        "training": {
            "per_device_train_batch_size": 4,
            "max_steps": 40,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        },
        "evaluation": {
            "max_new_tokens": 2,
            "baseline": False,
            "steps": 2,
            "metric_for_best_model": "loss",
            "early_stopping_patience": 2,
        },
    },
)

ADAPTER = "adapter/adapter_model.safetensors"


def train(folder: Path, job: dict[str, Any], code: int = 0, **environment: str) -> str:
    """The public command, with its checkpoints beside `runs/`."""
    file = folder / "job.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(job))
    command = ["train", str(file), "--runs", str(folder / "runs"), f"checkpoints.uri={folder / 'store'}"]
    done = subprocess.run(
        [sys.executable, "-m", "runner", *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "printed").write_text(train(folder, OVERFITS))
    return folder / "runs" / "overfits"


def test_it_stops_early_and_exports_the_best(undisturbed: Path, tmp_path: Path) -> None:
    result, seen = told(undisturbed), evaluations(undisturbed)
    assert (result["outcome"], result["stopped_early"]) == ("done", True)
    losses = [one["metrics"]["eval_loss"] for one in seen]
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 3
    assert result["best"] == {"step": 2 * best + 2, "metric": "loss", "value": min(losses)}
    assert result["steps"] == 2 * best + 6 < 40
    assert result["metrics"]["after"].items() <= seen[best]["metrics"].items()

    printed = (undisturbed.parents[1] / "printed").read_text()
    assert "every 2 steps; the best by loss is exported, and 2 without a better one end training" in printed
    assert f"training ended early; kept: step {result['best']['step']}, the best by loss (" in printed

    plain = merged(OVERFITS, {"training": {"max_steps": result["best"]["step"]}})
    train(tmp_path, {**plain, "evaluation": {"max_new_tokens": 2, "baseline": False}})
    assert digest(tmp_path / "runs" / "overfits" / ADAPTER) == digest(undisturbed / ADAPTER)


def test_an_export_names_the_step_that_was_kept(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "EXPORTER", warm.command("runner.train.export"))
    store, last, best = (
        undisturbed.parents[1] / "store",
        told(undisturbed)["steps"],
        told(undisturbed)["best"],
    )

    def exported(source: Path, *words: str) -> tuple[int, str]:
        to = tmp_path / "-".join([source.parent.name, *words])
        assert cli.main(["export", str(source), "--to", str(to), *words]) == 0
        step: int = json.loads((to / "export.json").read_text())["step"]
        return step, digest(to / "adapter_model.safetensors")

    kept = (best["step"], digest(undisturbed / ADAPTER))
    assert exported(undisturbed) == kept
    assert exported(store / "overfits") == kept
    step, other = exported(store / "overfits", "--step", str(last))
    assert step == last and other != kept[1]


def test_killed_around_the_best_and_moved_it_exports_the_same(undisturbed: Path, tmp_path: Path) -> None:
    best = told(undisturbed)["best"]["step"]
    points = {
        # The adapter, the first thing lost if what was best were not kept with the checkpoints.
        "in the evaluation of the best": f"runner.train.evaluation.evaluate:_generate:{best // 2}:self",
        "when it was told, and before the next save": "runner.train.watch:Watch.write:2:self",
        "in the loss of a later step": "runner.train.watched:WatchedTrainer.prediction_step:2:tree",
        "when its values go back into the model": "runner.train.watched:put:1:self",
    }
    environment = {
        "PYTHONPATH": str(Path(__file__).with_name("killpoint")),
        "KILL_AT": ";".join(points.values()),
        "KILLED": str(tmp_path / "marks"),
    }
    (tmp_path / "marks").mkdir()
    train(tmp_path, OVERFITS, code=-9, **environment)
    shutil.rmtree(tmp_path / "runs")  # another machine
    train(tmp_path, OVERFITS, **environment)
    assert len(list((tmp_path / "marks").iterdir())) == len(points)
    here = tmp_path / "runs" / "overfits"
    assert digest(here / ADAPTER) == digest(undisturbed / ADAPTER)
    assert (here / "steps.jsonl").read_bytes() == (undisturbed / "steps.jsonl").read_bytes()
    assert (here / "evaluations.jsonl").read_bytes() == (undisturbed / "evaluations.jsonl").read_bytes()
    for key in ("best", "stopped_early", "steps", "metrics"):
        assert told(here)[key] == told(undisturbed)[key]
    shutil.rmtree(tmp_path / "runs")
    train(tmp_path, OVERFITS)  # done already; a third machine gets what it ended with
    assert (here / "evaluations.jsonl").read_bytes() == (undisturbed / "evaluations.jsonl").read_bytes()


SHORT: dict[str, Any] = merged(
    OVERFITS, {"lora": {"lora_dropout": 0.0}, "training": {"per_device_train_batch_size": 2, "max_steps": 4}}
)
"""Evaluated at 2 and 4, and better at each; with a metric that never changes the first is the best."""
CONSTANT = merged(
    SHORT, {"evaluation": {"metric_for_best_model": "exact_match", "early_stopping_patience": None}}
)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_best_is_put_back_under_every_strategy(strategy: Strategy, tmp_path: Path) -> None:
    outcome, _ = run_ranks(tmp_path, CONSTANT, strategy, 2)
    assert outcome["outcome"] == "done", outcome["error"]
    assert outcome["best"] == {"step": 2, "metric": "exact_match", "value": 0.0}
    saved = {path.name[:8]: path for path in (tmp_path / "outbox").iterdir()}
    trained = load_file(saved["00000002"] / "parameters.safetensors")
    assert BEST not in {path.name for path in saved["00000002"].iterdir()}
    assert digest(saved["00000004"] / BEST) == digest(saved["00000002"] / "parameters.safetensors")
    exported = load_file(tmp_path / ADAPTER)
    assert len(exported) == len(trained)
    for name, value in exported.items():
        inside = name.replace(".weight", ".default.weight")
        assert torch.equal(value, trained[inside]), name


def test_dpo_is_watched_as_well(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    source = {"path": "pairs", "format": "preference"}
    changes = merged(
        SHORT,
        {
            "method": "dpo",
            "datasets": {
                "train": [{**source, "split": "train[:16]"}],
                "eval": [{**source, "split": "train[16:]"}],
            },
            "evaluation": {"baseline": True, "metric_for_best_model": "reward_accuracy"},
        },
    )
    outcome, _ = run(tmp_path / "run", changes, data=str(data))
    assert outcome["outcome"] == "done", outcome["error"]
    seen = evaluations(tmp_path / "run")
    assert [one["step"] for one in seen] == [2, 4]
    assert all({"reward_accuracy", "eval_loss"} <= one["metrics"].keys() for one in seen)
    best = next(one for one in reversed(seen) if one["best"])
    assert outcome["best"]["step"] == best["step"]
    assert outcome["metrics"]["after"]["preference_margin"] == best["metrics"]["preference_margin"]


def test_asked_to_stop_in_evaluations_they_are_made_again(tmp_path: Path) -> None:
    """In the answers of the first, and in the loss of the last step's, which ends an epoch as well."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    slowly = merged(SHORT, {"evaluation": {"batch_size": 1}, "training": {"per_device_eval_batch_size": 1}})
    outcome, _ = run(whole, slowly)
    assert outcome["outcome"] == "done", outcome["error"]
    saved = None
    for attempt, step in ((1, 2), (2, 4)):
        at = f"{step:08d}"
        told: list[str] = []

        def stop(event: dict[str, Any], attempt: int = attempt, at: str = at, told: list[str] = told) -> None:
            if event["event"] == "checkpoint":
                told.append(event["id"][:8])
            where = "evaluate" if attempt == 1 else "evaluate_loss"
            if event["event"] in ("phase", "progress") and event["phase"] == where and at in told:
                write(cut / "attempts" / str(attempt), Request("stop"))

        outcome, _ = run(cut, slowly, on_event=stop, attempt=attempt, restore=saved)
        assert (outcome["outcome"], outcome["exit_code"]) == ("preempted", 75), outcome
        saved = max((cut / "outbox").iterdir())
        assert saved.name.startswith(at)
        assert (cut / "evaluations.jsonl").exists() == (attempt > 1)
    outcome, events = run(cut, slowly, attempt=3, restore=saved)
    assert outcome["outcome"] == "done", outcome["error"]
    assert "begin" not in [event["event"] for event in events]
    for name in ("evaluations.jsonl", "steps.jsonl", ADAPTER):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
