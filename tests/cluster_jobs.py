"""Jobs that tests submit, and what they share to do so."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from runner.settings import Resolved, resolve

DOCS = Path(__file__).parents[1] / "docs" / "submit.md"

PLANTED = "planted-secret-4f9d"
"""The value of variables of the environment that may appear nowhere."""

JOB: dict[str, Any] = {
    "name": "charts",
    "model": {"name_or_path": "demo:smolvlm-tiny"},
    "datasets": {"train": [{"path": "demo:charts", "format": "vqa"}]},
    "checkpoints": {"uri": "s3://bucket/runs"},
}

KUBERNETES: dict[str, Any] = {**JOB, "kubernetes": {"image": "registry.example.com/vlm-runner:1"}}

BATCH: dict[str, Any] = {
    **JOB,
    "resources": {"gpu": 0, "cpu": 1, "memory": "2Gi", "shm": "1Gi"},
    "aws_batch": {"image": "registry.example.com/vlm-runner:1", "queue": "spot", "region": "us-east-1"},
}


def written(folder: Path, job: dict[str, Any]) -> str:
    """A job as a file; its path."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    return str(file)


def resolved(file: str, *overrides: str) -> Resolved:
    """The job that a command gets from a file."""
    return resolve(file, list(overrides), {})


def plant() -> None:
    """Secrets, as a person's shell has them."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN"):
        os.environ[name] = PLANTED


def documented(language: str) -> list[str]:
    """The blocks of docs/submit.md."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


def documented_commands() -> list[str]:
    """The commands of docs/submit.md, in order."""
    lines = [line for block in documented("bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line]
