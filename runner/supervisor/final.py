"""What a run ends with, as one folder: gathered to be committed with `done`, spread out on another machine.

adapter/ or model/    what was trained
evaluation/           metrics and predictions
steps.jsonl, result.json, job.yaml
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runner.checkpoint.files import seal
from runner.checkpoint.head import FINAL
from runner.durable import disk
from runner.supervisor.run_folder import RunFolder

FOLDERS = ("adapter", "model", "evaluation")
FILES = ("steps.jsonl", "result.json", "job.yaml")


def gather(folder: RunFolder, step: int, parent: str | None) -> Path:
    """A sealed folder of links to everything that the run ends with. Nothing of it changes afterwards."""
    target = folder.path / FINAL
    with disk("gather what the run ends with", target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        sources = [path for name in FOLDERS for path in sorted((folder.path / name).glob("*"))]
        for source in (*sources, *(folder.path / name for name in FILES)):
            if source.is_file():
                place = target / source.relative_to(folder.path)
                place.parent.mkdir(exist_ok=True)
                os.link(source, place)
        seal(target, id=FINAL, step=step, parent=parent, extra={})
    return target


def spread(fetched: Path, folder: RunFolder) -> None:
    """Put what was gathered on another machine in its places. What is there already stays."""
    with disk("put back what the run ended with", folder.path):
        for name in (*FOLDERS, *FILES):
            source, target = fetched / name, folder.path / name
            if source.exists() and not target.exists():
                source.rename(target)
        shutil.rmtree(fetched)
