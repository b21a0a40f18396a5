"""What is run in a campaign: trainers without torch, lean or with the runner's code, and their one job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos import rank
from tests.chaos.nursery import USUAL, Hurry, Nursery
from tests.chaos.observer import Observer
from tests.chaos.proxy import KillProxy
from tests.chaos.run import Arena, Kind
from tests.conftest import FOREIGN
from tests.s3_server import s3_server

FAKE_RANK = Path(__file__).parents[1] / "fake_rank.py"

SCRIPT = {"steps": 6, "save": 1, "step_seconds": 0.05, "frozen": 150_000, "state": 20_000}
"""Slow enough that several checkpoints are sent, fast enough that some are replaced while they wait; the
frozen file travels in parts."""


def job(sources: Path) -> dict[str, Any]:
    """A job whose model and data are in a folder; made there if they are not."""
    model, data = sources / "model", sources / "rows.jsonl"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    data.write_text('{"image": "a.png", "question": "?", "answer": "!"}\n')
    source = {"path": str(data), "format": "vqa"}
    return {
        "model": {"name_or_path": str(model)},
        "datasets": {"train": [source], "eval": [source]},
        "evaluation": {"max_new_tokens": 8},
        "checkpoints": {"keep_last": 2},
    }


def lean(sources: Path, hurry: Hurry = USUAL, **script: Any) -> Kind:
    """The trainer that starts in milliseconds."""
    command = (sys.executable, "-I", "-S", rank.__file__, json.dumps({**SCRIPT, **script}))
    return Kind(command, job(sources), hurry)


def whole(sources: Path, hurry: Hurry = USUAL) -> Kind:
    """The trainer of the other tests, which seals and publishes as the real one does."""
    script = {"steps": 6, "save": 1, "step_seconds": 0.05, "frozen_bytes": 150_000, "state_bytes": 20_000}
    command = (sys.executable, str(FAKE_RANK), json.dumps(script))
    return Kind(command, job(sources), hurry, kept=("adapter/*",))


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """A server, a proxy, an observer and a nursery, and a folder that is left where something was wrong.

    To be entered before this process has threads.
    """
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    # As tests/conftest.py sets them, for trainers that import more.
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    os.environ |= {"HOME": str(folder), **quiet}
    # So small parts that a file of a hundred kilobytes has several; and all of it in memory.
    os.environ |= {"S3_UPLOAD_PART_MIN_SIZE": "256", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(16 << 20)}
    with s3_server() as port:
        nursery, observer = Nursery(), Observer(port)
        with nursery, observer, KillProxy(port) as proxy:
            yield Arena(port, proxy, nursery, observer, folder)
    if not any(folder.glob("*/store")):
        shutil.rmtree(folder)
