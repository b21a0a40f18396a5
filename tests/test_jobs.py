"""Every job file that is shipped: it validates, says what it is, and trains two steps.

The model and the place of the data are swapped for our own by overrides alone; the data are copies with the
columns and types of the datasets that the jobs name (`tests.recorded`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runner import launch
from runner.settings import resolve
from tests import warm
from tests.recorded import SCHEMAS, copy

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
HEADER = (
    r"# Shows: .*\n(#.*\n)*# Hardware: .*\n(#.*\n)*# Time: .*\n(#.*\n)*# Command:   make train JOB=jobs/{}\n"
)

SMALL = [
    "model.name_or_path=demo:smolvlm-tiny",
    "model.image_backend=pil",
    "model.processor={}",
    "training.max_steps=2",
    "training.global_batch_size=2",
    "training.per_device_train_batch_size=1",
    "training.dataloader_num_workers=0",
    "evaluation.max_new_tokens=2",
    "evaluation.max_samples=2",
]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    return {hub_id: copy(hub_id, folder) for hub_id in SCHEMAS}


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_a_job_opens_with_what_it_is(file: Path) -> None:
    text = file.read_text("utf-8")
    assert re.match(HEADER.format(re.escape(file.name)), text), "Shows, Hardware, Time, Command"
    assert f"\nname: {file.stem}\n" in text


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_a_job_trains_two_steps(
    file: Path, tmp_path: Path, copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve(str(file), [], {}).job
    overrides = list(SMALL)
    for part in ("train", "eval"):
        for index, source in enumerate(getattr(job.datasets, part)):
            if not source.path.startswith("demo:"):
                overrides.append(f"datasets.{part}[{index}].path={copies[source.path]}")
    monkeypatch.chdir(tmp_path)
    trainer = warm.command("runner.train")
    assert launch.train(resolve(str(file), overrides, {}), tmp_path, trainer=trainer) == 0
    result = json.loads((tmp_path / job.name / "result.json").read_text())
    assert result["steps"] == 2
    assert all(metrics for metrics in result["metrics"].values())
    assert result["facts"]["trainable_dtypes"] == ["float32"]
