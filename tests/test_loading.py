"""Who decodes images: the documented tables, what a job says wins, and how long a step waited for data."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from runner.events import Event
from runner.supervisor.screen import Screen
from runner.train import loading
from runner.train.loading import Room, Timed, prefetch, workers
from tests.attempts import planned, run, steps

SOURCE = {"split": "train", "format": "vqa", "columns": {"question": "query", "answer": "label"}}

GPU = Room(gpu=True, cores=16, shared=64 << 30)


@pytest.mark.parametrize(
    ("gpu", "cores", "shared", "count"),
    [
        (False, 64, math.inf, 0),
        (True, 16, 64 << 30, 8),
        (True, 16, math.inf, 8),
        (True, 4, 64 << 30, 3),
        (True, 2.5, 64 << 30, 1),
        (True, 1, 64 << 30, 1),
        (True, 16, 3 << 30, 3),
        (True, 16, 64 << 20, 0),
    ],
)
def test_workers(gpu: bool, cores: float, shared: float, count: int) -> None:
    assert workers(Room(gpu, cores, shared)) == count


@pytest.mark.parametrize(
    ("accumulation", "per_device", "ahead"), [(1, 8, 2), (32, 1, 4), (512, 1, 16), (64, 8, 2), (8, 64, 2)]
)
def test_prefetch(accumulation: int, per_device: int, ahead: int) -> None:
    assert prefetch(8, accumulation, per_device) == ahead


@pytest.mark.parametrize(
    ("given", "room", "wanted"),
    [
        ({}, GPU, (8, True, 2, True)),
        ({}, Room(gpu=False, cores=16, shared=math.inf), (0, None, None, False)),
        ({"dataloader_num_workers": 0}, GPU, (0, None, None, True)),
        (
            {"dataloader_num_workers": 2},
            Room(gpu=False, cores=2, shared=math.inf),
            (2, True, 4, False),
        ),
        (
            {
                "dataloader_num_workers": 3,
                "dataloader_persistent_workers": False,
                "dataloader_prefetch_factor": 5,
                "dataloader_pin_memory": False,
            },
            GPU,
            (3, False, 5, False),
        ),
    ],
)
def test_what_a_job_says_wins(tmp_path: Path, given: dict[str, Any], room: Room, wanted: tuple[Any]) -> None:
    """Eight rows in micro-batches of one."""
    found = loading.arguments(planned(tmp_path, {"training": given}), room)
    names = ("num_workers", "persistent_workers", "prefetch_factor", "pin_memory")
    assert tuple(found.get(f"dataloader_{name}") for name in names) == wanted


def test_here_is_this_machine() -> None:
    room = Room.here()
    assert room.gpu == torch.cuda.is_available()
    assert room.cores >= 1
    assert room.shared > 0


def test_time_is_taken_while_waiting_and_not_while_working() -> None:
    def slow() -> Any:
        for number in range(3):
            time.sleep(0.05)
            yield number

    timed = Timed(slow())
    assert next(iter(timed)) == 0
    time.sleep(0.2)
    assert list(timed) == [1, 2]
    assert 0.15 <= timed.seconds < 0.3


def slow_charts(file: Path, side: int) -> float:
    """Eight pictures of noise; returns the seconds that decoding them takes."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype="uint8")
    picture = file.with_suffix(".png")
    Image.fromarray(noise).save(picture, compress_level=1)
    began = time.monotonic()
    for _ in range(8):
        Image.open(picture).convert("RGB")
    took = time.monotonic() - began
    Dataset.from_dict(
        {
            "image": [{"bytes": picture.read_bytes(), "path": None}] * 8,
            "query": [f"What is {number}?" for number in range(8)],
            "label": [[str(number)] for number in range(8)],
        },
        features=Features(
            {
                "image": ImageFeature(decode=False),
                "query": Value("string"),
                "label": Sequence(Value("string")),
            }
        ),
    ).cast_column("image", ImageFeature()).to_parquet(file)
    return took


@pytest.mark.parametrize("processes", [0, 2])
def test_a_step_says_how_long_it_waited_for_slow_images(tmp_path: Path, processes: int) -> None:
    """In this process all of it is waiting. In workers it is at the start, where nothing is ahead yet; and
    the record of steps, which is the same of every run, knows nothing of it."""
    file = tmp_path / "charts.parquet"
    took = slow_charts(file, 2000)
    training = {"global_batch_size": 1, "max_steps": 8, "dataloader_num_workers": processes}
    changes = {"datasets": {"train": [{**SOURCE, "path": str(file)}]}, "training": training}
    outcome, events = run(tmp_path / "run", changes, data=file)
    assert outcome["outcome"] == "done"
    waited = [step["data_seconds"] for step in steps(events)]
    assert len(waited) == 8
    assert all(0 <= step["data_seconds"] <= step["seconds"] for step in steps(events))
    if processes == 0:
        assert sum(waited) > 0.7 * took
    assert waited[0] > took / 8
    assert outcome["facts"]["dataloader_num_workers"] == processes
    assert "data_seconds" not in (tmp_path / "run" / "steps.jsonl").read_text()


def test_a_bad_image_in_a_worker_is_one_line(tmp_path: Path) -> None:
    """It was there when the rows were checked; PyTorch puts a traceback before what the worker says."""
    lines = []
    for number in range(8):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "query": f"What is {number}?", "label": "1"}))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))

    def damage(event: Event) -> None:
        if event["event"] == "audit":
            for picture in tmp_path.glob("*.png"):
                picture.write_bytes(b"no picture")

    changes = {
        "datasets": {"train": [{**SOURCE, "path": str(file)}]},
        "training": {"dataloader_num_workers": 1},
    }
    outcome, _ = run(tmp_path / "run", changes, data=file, on_event=damage)
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 65)
    assert outcome["error"].startswith(f"{file}")
    assert "It was readable when the rows were checked" in outcome["error"]
    assert "Traceback" not in outcome["error"] and "\n" not in outcome["error"]


@pytest.mark.parametrize(("waited", "said"), [(0.0, False), (0.01, False), (0.5, True), (None, False)])
def test_people_are_told_when_training_waits_for_data(
    waited: float | None, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    event: Event = {
        "event": "step",
        "step": 1,
        "steps": 1,
        "loss": 0.5,
        "tokens": 9,
        "images": 1,
        "seconds": 1.0,
    }
    screen = Screen()
    screen.show(event if waited is None else {**event, "data_seconds": waited})
    screen.close()
    assert ("50% waiting for data" in capsys.readouterr().out) == said
