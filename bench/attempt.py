"""What the benches share: a random model in SmolVLM's shape, rows of pictures, and one trainer process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.demo import resolve_model
from runner.manifest import Job
from runner.plan import Fetched, Plan, geometry

VISION = {"hidden_size": 192, "intermediate_size": 720, "num_hidden_layers": 4, "num_attention_heads": 3}
TEXT = {"hidden_size": 336, "intermediate_size": 1344, "num_hidden_layers": 4, "num_attention_heads": 6}
TEXT |= {"num_key_value_heads": 6, "head_dim": 56, "vocab_size": 8192, "max_position_embeddings": 4096}


class Failed(SystemExit):
    """A training process that ended badly: it ends this program, too, unless a bench goes on without it."""


def build_model(
    folder: Path,
    text: dict[str, int] | None = None,
    vision: dict[str, int] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """A random model of SmolVLM's shape: widths, depths and vocabulary divided by six.

    Args:
        text: other sizes of the text model.
        vision: other sizes of the vision tower.
        dtype: of the saved weights.
        device: where the random numbers are drawn.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    demo = resolve_model("demo:smolvlm-tiny")
    config = AutoConfig.from_pretrained(demo)
    for name, value in {**VISION, "image_size": 384, "patch_size": 14, **(vision or {})}.items():
        setattr(config.vision_config, name, value)
    for name, value in {**TEXT, **(text or {})}.items():
        setattr(config.text_config, name, value)
    config.scale_factor = 3
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(demo, backend="pil").save_pretrained(folder)


def build_rows(file: Path, rows: int) -> None:
    """850 x 600 pictures, which the processor cuts into 13 tiles."""
    from datasets import Dataset, Features, Image, Sequence, Value
    from PIL import Image as Pillow

    pictures = [Pillow.new("RGB", (850, 600), (40 * index % 256, 90, 160)) for index in range(rows)]
    Dataset.from_dict(
        {
            "image": pictures,
            "query": [f"What is the value of bar {index}?" for index in range(rows)],
            "label": [[str(7 * index)] for index in range(rows)],
        },
        features=Features({"image": Image(), "query": Value("string"), "label": Sequence(Value("string"))}),
    ).to_parquet(file)


@dataclass(frozen=True)
class Measured:
    """What one trainer process said and took."""

    steps: list[dict[str, Any]]
    """Its step events."""
    facts: dict[str, Any]
    process: dict[str, Any]
    """Its `process_facts`."""
    idle_bytes: int
    """Resident just before it loaded the model: Python and the libraries."""
    before_seconds: float
    """From the beginning of training to its first step."""


def trainer(run_dir: Path, job: Job, model: Path, data: Path, patience: float | None = None) -> Measured:
    """The runner's own trainer process, as the supervisor starts it. Its cache is the run's own, so that no
    run finds what another one left.

    Args:
        patience: seconds after which it is ended.

    Raises:
        Failed: it did not end well.
    """
    attempt_dir = run_dir / "attempts" / "1"
    attempt_dir.mkdir(parents=True)
    (run_dir / "outbox").mkdir()
    plan = Plan(
        purpose="train",
        job=job,
        run_dir=run_dir,
        attempt=1,
        attempt_dir=attempt_dir,
        geometry=geometry(job),
        fetched=Fetched(model=str(model), train=[str(data)], eval=[]),
        save_seconds=3600,
    )
    (attempt_dir / "plan.json").write_text(plan.model_dump_json())
    reader, writer = os.pipe()
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
    environment = {
        "RUNNER_EVENTS_FD": str(writer),
        "RUNNER_CACHE": str(run_dir / "cache"),
        "PYTHONPATH": path,
    }
    with (attempt_dir / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(here / "measured_trainer.py"), str(attempt_dir / "plan.json")],
            env={**os.environ, **environment},
            pass_fds=[writer],
            stdout=log,
            stderr=log,
        )
        os.close(writer)
        alarm = threading.Timer(patience or threading.TIMEOUT_MAX, process.kill)
        alarm.daemon = True
        alarm.start()
        idle, steps, marks = 0, [], {}
        with os.fdopen(reader) as lines:
            for event in map(json.loads, lines):
                name = event.get("phase", event["event"])
                marks.setdefault(name, time.monotonic())
                if name == "load":
                    idle = _resident(process.pid)
                elif name == "step":
                    steps.append(event)
        code = process.wait()
        alarm.cancel()
    if code != 0:
        raise Failed(f"the runner failed: {(attempt_dir / 'log').read_text()[-2000:]}")
    outcome = json.loads((attempt_dir / "outcome.json").read_text())
    measured = json.loads((attempt_dir / "measured.json").read_text())
    return Measured(steps, outcome["facts"], measured, idle, marks["begin"] - marks["train"])


def _resident(pid: int) -> int:
    """Bytes of a process in memory, now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
