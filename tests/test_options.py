"""Options that could make a resumed run another run, and those that end one: real trainer processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.attempts import JOB, run, steps

SOURCE = JOB["datasets"]["train"][0]
DRAWING = {
    "lora": {"lora_dropout": 0.2},
    "training": {"per_device_train_batch_size": 8},
    "checkpoints": {"save_steps": 1},
}
PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0},
    "eval_strategy": "epoch",
    "learning_rate": 0.3,
}


@pytest.mark.parametrize(
    ("training", "step"),
    [({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, 2), (PLATEAU, 2)],
    ids=["persistent workers", "a schedule that follows the evaluation of an epoch"],
)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, training: dict[str, Any], step: int) -> None:
    changes = {
        **DRAWING,
        "training": {**DRAWING["training"], "num_train_epochs": 3, **training},
        "datasets": {"eval": [{**SOURCE, "split": "val[:8]"}]},
    }
    whole = tmp_path / "whole"
    outcome, _ = run(whole, changes)
    assert outcome["outcome"] == "done", outcome["error"]
    (checkpoint,) = (whole / "outbox").glob(f"{step:08d}-*")
    _, events = run(tmp_path / "resumed", changes, restore=checkpoint)
    assert [one["step"] for one in steps(events)] == [3, 4, 5, 6]
    for name in ("steps.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


def test_a_loss_that_is_no_number_ends_the_attempt_and_saves_nothing_of_it(tmp_path: Path) -> None:
    changes = {**DRAWING, "training": {**DRAWING["training"], "learning_rate": 1e30, "max_grad_norm": 0}}
    outcome, events = run(tmp_path, changes)
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 1)
    assert "learning_rate" in outcome["error"]
    assert len(steps(events)) < 4
    assert not (tmp_path / "adapter").exists()


def test_an_optimizer_whose_package_is_missing_is_a_bad_job(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, {"training": {"optim": "galore_adamw", "optim_target_modules": "all-linear"}})
    assert outcome["exit_code"] == 78
    assert "galore" in outcome["error"].lower()


def test_a_run_without_an_adapter_leaves_a_model(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, {"lora": None, "training": {"per_device_train_batch_size": 8, "max_steps": 1}})
    assert outcome["outcome"] == "done", outcome["error"]
    assert (tmp_path / "model" / "config.json").exists()
    assert outcome["facts"]["parts"]["vision_tower"]["trainable"] == 0
