"""Kill it anywhere, run the same command again: the same adapter, byte for byte, the same loss every step.

Real processes, real SIGKILLs: at named points (`tests/killpoint`) and at random moments. The job has what
breaks naive resumes: dropout, two loader workers, a 4-bit base in bfloat16, evaluation of the loss and by
generation during training, a constant schedule, rows that do not fill the last global batch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.attempts import JOB, merged

KILLPOINT = Path(__file__).with_name("killpoint")
SOURCE = JOB["datasets"]["train"][0]
RUN = merged(
    JOB,
    {
        "name": "killed",
        "model": {"dtype": "bfloat16"},
        "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "lora": {"lora_dropout": 0.1},
        "datasets": {"train": [{**SOURCE, "split": "train[:20]"}], "eval": [{**SOURCE, "split": "test[:6]"}]},
        "training": {
            "per_device_train_batch_size": 2,
            "num_train_epochs": 3,
            "lr_scheduler_type": "constant",
            "dataloader_num_workers": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        "evaluation": {"max_new_tokens": 3, "steps": 3},
        "checkpoints": {"save_steps": 2},
    },
)
"""20 rows, batches of 8 in micro-batches of 2: 3 steps an epoch, 9 in all; saved at 2, 4, 6, 8 and 9,
and at 3 before its evaluation."""

TRAINER = {
    "mid-accumulation, step 3": "transformers.trainer:Trainer.training_step:11:self",
    "between the save of step 6 and its publication": "runner.train.trainer:publish:3:self",
    "in the evaluation at step 6": "runner.train.evaluation.evaluate:_generate:1:self",
}
"""In this order; the supervisor lives, starts the next attempt from the newest checkpoint, and goes on."""

TREE = {
    "in the evaluation before training": "runner.train.evaluation.evaluate:_generate:1:tree",
    "mid-accumulation, step 5": "transformers.trainer:Trainer.training_step:18:tree",
    "in the save of step 6": "runner.train.state:save_file:2:tree",
    "in the supervisor's commit": "runner.checkpoint.commit:manifest_key:1:self",
    "after an optimizer step, before its record": "runner.train.trainer:RunTrainer._record:2:tree",
    "between the last save and the end": "runner.train.run:_export:1:tree",
    "in the evaluation after training": "runner.train.evaluation.evaluate:_generate:1:tree",
}
"""In this order; trainer and supervisor die together, and the same command is given again."""


def command(job: Path, runs: Path) -> list[str]:
    return [sys.executable, "-m", "runner", "train", str(job), "--runs", str(runs)]


def start(job: Path, runs: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(job, runs),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_behind(runs: Path) -> dict[str, bytes]:
    """What must be the same however often the run was killed."""
    run = runs / "killed"
    return {
        **{file.name: file.read_bytes() for file in sorted((run / "adapter").iterdir())},
        "steps": (run / "steps.jsonl").read_bytes(),
        "after": (run / "evaluation" / "after.predictions.jsonl").read_bytes(),
    }


def result(runs: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((runs / "killed" / "result.json").read_text())
    return answer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("job") / "job.yaml"
    file.write_text(yaml.safe_dump(RUN))
    return file


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    runs = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(job, runs), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    left = left_behind(runs)
    assert len(left["steps"].splitlines()) == 9
    assert result(runs)["attempts"] == 1
    return left


def killing(points: dict[str, str], marks: Path) -> dict[str, str]:
    """The environment in which processes die at `points`, one after the other."""
    marks.mkdir()
    return {"PYTHONPATH": str(KILLPOINT), "KILL_AT": ";".join(points.values()), "KILLED": str(marks)}


def test_a_trainer_killed_again_and_again_ends_with_the_same_bytes(
    job: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(job, tmp_path, **killing(TRAINER, tmp_path / "marks"))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert len(list((tmp_path / "marks").iterdir())) == len(TRAINER), printed
    assert left_behind(tmp_path) == undisturbed
    assert result(tmp_path)["attempts"] == len(TRAINER) + 1
    assert [restart["step"] for restart in result(tmp_path)["restarts"]] == [2, 4, 6]


def test_a_tree_killed_again_and_again_ends_with_the_same_bytes(
    job: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    environment = killing(TREE, tmp_path / "marks")
    for place in TREE:
        process = start(job, tmp_path, **environment)
        printed, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{place}: nothing died:\n{printed}"
    last = start(job, tmp_path, **environment)
    printed, _ = last.communicate()
    assert last.returncode == 0, printed
    assert left_behind(tmp_path) == undisturbed
    assert result(tmp_path)["outcome"] == "done"


def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    job: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The supervisor dies by SIGKILL after a random number of events, twice."""
    chance = random.Random()
    deaths = 0
    while deaths < 2:
        process = start(job, tmp_path)
        events = tmp_path / "killed" / "events.jsonl"
        seen = len(events.read_bytes().splitlines()) if events.exists() else 0
        until = seen + chance.randrange(8, 30)
        while process.poll() is None and not (
            events.exists() and len(events.read_bytes().splitlines()) >= until
        ):
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            deaths += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert deaths > 0
    last = subprocess.run(command(job, tmp_path), capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    assert left_behind(tmp_path) == undisturbed


def test_ctrl_c_saves_and_leaves_with_75_and_the_same_command_goes_on(
    job: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(job, tmp_path)
    events = tmp_path / "killed" / "events.jsonl"
    while process.poll() is None and not (events.exists() and b'"event": "step"' in events.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 75, printed
    assert result(tmp_path)["outcome"] == "preempted"
    assert result(tmp_path)["exit_code"] == 75
    saved = result(tmp_path)["steps"]
    again = subprocess.run(command(job, tmp_path), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert left_behind(tmp_path) == undisturbed
    assert result(tmp_path)["steps"] == 9 >= saved

    done = subprocess.run(command(job, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0
    assert "already" in done.stdout + done.stderr
