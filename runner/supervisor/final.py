"""What a run ends with, as one folder: gathered to be committed with `done`, spread out on another machine.

adapter/ or model/    what was trained
evaluation/           metrics and predictions
steps.jsonl, evaluations.jsonl, result.json, job.yaml
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runner.checkpoint.files import seal
from runner.checkpoint.head import FINAL, TRAINED
from runner.durable import disk
from runner.supervisor import result
from runner.supervisor.result import Result
from runner.supervisor.run_folder import RunFolder

FOLDERS = ("adapter", "model")
EVALUATION = "evaluation"
FILES = ("steps.jsonl", "evaluations.jsonl", "job.yaml")
RESULT = "result.json"


def gather(folder: RunFolder, ended: Result) -> Path:
    """A sealed folder of links to everything that the run ends with. Nothing of it changes afterwards.

    Args:
        ended: what result.json will say, once this is committed.
    """
    target = folder.path / FINAL
    with disk("gather what the run ends with", target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        folders = (*FOLDERS, EVALUATION)
        sources = [path for name in folders for path in sorted((folder.path / name).glob("*"))]
        for source in (*sources, *(folder.path / name for name in FILES)):
            if source.is_file():
                place = target / source.relative_to(folder.path)
                place.parent.mkdir(exist_ok=True)
                try:
                    os.link(source, place)
                except OSError:  # a file system without links; it costs space
                    shutil.copyfile(source, place)
        result.write(target / RESULT, ended)
        seal(
            target, id=FINAL, step=ended.steps, parent=ended.checkpoint, extra={TRAINED: ended.exported_step}
        )
    return target


def spread(fetched: Path, folder: RunFolder) -> None:
    """Put what was gathered on a machine in its places, over what an earlier attempt left there.

    What else lies there stays. result.json comes last: it says that the rest is there.
    """
    with disk("put back what the run ended with", folder.path):
        for name in FOLDERS:
            if (fetched / name).exists():
                shutil.rmtree(folder.path / name, ignore_errors=True)
                (fetched / name).rename(folder.path / name)
        evaluated = [f"{EVALUATION}/{path.name}" for path in sorted((fetched / EVALUATION).glob("*"))]
        for name in (*evaluated, *FILES, RESULT):
            if (fetched / name).exists():
                (folder.path / name).parent.mkdir(exist_ok=True)
                (fetched / name).replace(folder.path / name)
        shutil.rmtree(fetched)
