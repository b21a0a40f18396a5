"""`runs/<name>/` as data, whoever writes to it meanwhile: nothing is decided here, and nothing is written.

Every file may be missing, half-written or of another version; what cannot be read is not there. Only a folder
that is no run at all is an error.
"""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from runner import events, health
from runner.errors import DataError
from runner.report.history import History, history
from runner.report.job_text import Value, nested, values
from runner.report.loose import document, lines, mapping, text, whole

BEFORE, AFTER = "before", "after"

ALIVE = 30.0
"""Seconds since a supervisor last looked around, above which it is taken for dead."""

State = Literal["done", "preempted", "failed", "running", "interrupted", "begun"]

_MARKS_OF_A_RUN = ("events.jsonl", "result.json")
"""Not job.yaml, which lies in many a folder."""


@dataclass(frozen=True)
class Run:
    """All that a folder tells of a run."""

    place: str
    """Where it was read."""
    name: str
    state: State
    job: tuple[Value, ...]
    """Every value of the resolved job with its source; empty where there is none."""
    resolved: Mapping[str, Any]
    """The same, nested."""
    result: Mapping[str, Any]
    """result.json; empty where there is none."""
    history: History
    before: tuple[Mapping[str, Any], ...]
    """Records of predictions."""
    after: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    """Lines of evaluations.jsonl: what was evaluated during training."""
    images: Mapping[str, bytes]
    """WebP by name."""
    checkpoint_bytes: int | None
    """Of the newest checkpoint that is here."""
    read_at: float
    """Seconds since the epoch."""

    def value(self, key: str) -> Any:
        """A value of the job by its dotted key; None where it is not set."""
        return next((one.value for one in self.job if one.key == key), None)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in _MARKS_OF_A_RUN)


def read(folder: Path, place: str | None = None, done: bool = False) -> Run:
    """Read a run.

    Args:
        place: what to call it; the folder by default.
        done: whether its store says so: then its events may lack the last word.

    Raises:
        DataError: the folder is no run.
    """
    if not is_run(folder):
        raise DataError(
            f"report: {folder} is no run: it has none of {', '.join(_MARKS_OF_A_RUN)}; remedy: name the "
            "folder of one (runs/<name>), or the job that was trained"
        )
    result = document(_bytes(folder / "result.json")) or {}
    told = history(events.read(folder / "events.jsonl"), lines(_steps(folder)))
    if done and told.end is None:
        told = replace(told, end={"event": "end", "outcome": "done", "exit_code": 0})
    written = _bytes(folder / "job.yaml")
    job = values(written)
    name = next((str(one.value) for one in job if one.key == "name"), None)
    beat = health.beat(folder)
    return Run(
        place=place or str(folder),
        name=name or text(result.get("name")) or folder.name,
        state=state_of(told, result, None if beat is None else time.monotonic() - beat),
        job=job,
        resolved=nested(written),
        result=result if _current(told) else {},
        history=told,
        before=tuple(lines(_bytes(folder / "evaluation" / f"{BEFORE}.predictions.jsonl"))),
        after=tuple(lines(_bytes(folder / "evaluation" / f"{AFTER}.predictions.jsonl"))),
        evaluations=tuple(lines(_bytes(folder / "evaluations.jsonl"))),
        images=_images(folder / "evaluation" / "images.zip"),
        checkpoint_bytes=_checkpoint_bytes(folder),
        read_at=time.time(),
    )


def state_of(told: History, result: Mapping[str, Any], beat_age: float | None) -> State:
    """What a run is at.

        last of start and end   its supervisor's last look   result.json   state
        end                     any                          any           the outcome of the end
        start                   young                        any           running
        start                   old, or none                 any           interrupted
        neither                 any                          yes           its outcome
        neither                 any                          no            begun

    Args:
        beat_age: seconds since that look; None where there is none of this boot of this machine.
    """
    if told.end is None and told.began is not None:
        return "running" if beat_age is not None and 0 <= beat_age <= ALIVE else "interrupted"
    said = result if told.end is None else told.end
    match said.get("outcome"):
        case "done":
            return "done"
        case "preempted":
            return "preempted"
        case None if told.end is None:
            return "begun"
        case _:
            return "failed"


def _current(told: History) -> bool:
    """Whether result.json is of the newest command: while one is at work it is of the one before."""
    return told.end is not None or told.began is None


def _steps(folder: Path) -> bytes:
    """The record of steps: of the end, or of the newest checkpoint that is here."""
    newest = sorted(folder.glob("newest/*/steps.jsonl"))
    return _bytes(folder / "steps.jsonl") or (_bytes(newest[-1]) if newest else b"")


def _checkpoint_bytes(folder: Path) -> int | None:
    for manifest in sorted(folder.glob("newest/*/checkpoint.json"), reverse=True):
        files = mapping((document(_bytes(manifest)) or {}).get("files")).values()
        sizes = [whole(mapping(record).get("size")) for record in files]
        return sum(size or 0 for size in sizes) or None
    return None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _images(path: Path) -> Mapping[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error):
        return {}  # a damaged one may speak of compressions and passwords that there are not
