"""The two demos do what the README says of them: whole runs by the public command, minutes each."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def trained(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A demo's result and what it printed."""
    done = subprocess.run(
        ["make", "-C", str(ROOT), "train", f"JOB=jobs/{name}.yaml", f"SET=--runs {folder}"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((folder / name / "result.json").read_text())
    assert result["facts"]["parts"]["language_model"]["linear4bit"] > 0
    return result, done.stdout


def test_one_learns_to_read_charts(tmp_path: Path) -> None:
    """At most 0.35 before, at least 0.80 after, on 200 charts or more that training never saw."""
    result, printed = trained("demo-sft", tmp_path)
    before, after = (result["metrics"][when]["relaxed_accuracy"] for when in ("before", "after"))
    assert before["n"] == after["n"] >= 200
    assert before["overall"] <= 0.35
    assert after["overall"] >= 0.80
    assert f"{before['overall']:.2f} -> {after['overall']:.2f}" in printed


def test_one_learns_what_people_prefer(tmp_path: Path) -> None:
    """0.40-0.60 before, 0.90 or more after, on 200 pairs or more; half the rejected answers or fewer."""
    result, printed = trained("demo-dpo", tmp_path)
    before, after = result["metrics"]["before"], result["metrics"]["after"]
    accuracy = [one["preference_accuracy"] for one in (before, after)]
    assert accuracy[0]["n"] == accuracy[1]["n"] >= 200
    assert accuracy[0]["overall"] == pytest.approx(0.5, abs=0.1)
    assert accuracy[1]["low"] <= accuracy[1]["overall"] <= accuracy[1]["high"]
    assert accuracy[1]["overall"] >= 0.90
    assert before["reward_accuracy"] is None or before["reward_accuracy"]["overall"] is None
    assert before["generated_rejected"]["overall"] >= 0.2, "there is something to unlearn"
    assert after["generated_rejected"]["overall"] <= before["generated_rejected"]["overall"] / 2
    said = [f"{one['overall']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in accuracy]
    assert f"preference accuracy  {said[0]} -> {said[1]}  (n={accuracy[0]['n']})" in printed
