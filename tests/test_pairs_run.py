"""Evaluation on pairs as a stage of a run: before, on the way and after, in files and in the outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from runner.train.data.collator import Collator
from runner.train.evaluation.pairs import score
from tests.attempts import pairs, run
from tests.samples import rows, smolvlm, source
from tests.test_evaluate import float32

SOURCE = {"path": "pairs.parquet", "split": "train[:8]", "format": "preference"}
BETA = 0.5
CHANGES: dict[str, Any] = {
    "method": "dpo",
    "datasets": {"train": [SOURCE], "eval": [SOURCE]},
    "training": {"max_steps": 2, "beta": BETA, "per_device_train_batch_size": 8},
    "evaluation": {"batch_size": 8, "max_new_tokens": 2, "steps": 1},
}
STARTED = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
"""An adapter that is not zero."""


def records(folder: Path, label: str) -> list[dict[str, Any]]:
    lines = (folder / "evaluation" / f"{label}.predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def started(folder: Path) -> Any:
    """The base model under an adapter that changes it, saved in `folder`."""
    torch.manual_seed(0)
    model = get_peft_model(float32(), LoraConfig(**STARTED, exclude_modules=".*vision.*"))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("goes_on", [False, True])
def test_metrics_before_on_the_way_and_after(tmp_path: Path, goes_on: bool) -> None:
    """`before` is what training starts from: the base, or the adapter that the run goes on with."""
    data = pairs(tmp_path)
    start = tmp_path / "start" if goes_on else None
    model = float32().eval() if start is None else started(start)
    changes = CHANGES if start is None else {**CHANGES, "lora": {"init_from": str(start), **STARTED}}
    folder = tmp_path / "run"
    outcome, events = run(folder, changes, data=data, init_from=None if start is None else str(start))
    assert outcome["outcome"] == "done", outcome

    processor = smolvlm()
    shown = rows(processor, (source("pairs", **{k: v for k, v in SOURCE.items() if k != "path"}), data))
    collator = Collator(processor, "preference", torch.float32)
    found = score(model, collator([shown.dataset[index] for index in range(8)]))
    before = records(folder, "before")
    assert [one["logp_chosen"] for one in before] == pytest.approx(
        [one.logp_chosen for one in found], abs=1e-3
    )
    assert outcome["metrics"]["before"]["reward_accuracy"] is None
    told = [event for event in events if event["event"] == "evaluation"]
    (loss,) = (event for event in told if "eval_loss" in event["metrics"])
    told.remove(loss)
    assert (loss["when"], loss["step"]) == ("during", 1)
    assert [(event["when"], event["step"]) for event in told] == [("before", 0), ("during", 1), ("after", 2)]
    for label, metrics in (("step-00000001", told[1]["metrics"]), ("after", outcome["metrics"]["after"])):
        margins = [
            BETA
            * ((now["logp_chosen"] - then["logp_chosen"]) - (now["logp_rejected"] - then["logp_rejected"]))
            for then, now in zip(before, records(folder, label), strict=True)
        ]
        assert metrics["reward_margin"]["overall"] == pytest.approx(sum(margins) / 8)
        assert metrics["reward_accuracy"]["overall"] > 0.5, "a step of training went the right way"
