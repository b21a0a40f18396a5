"""The verb: finds the runs that its words name, reads them, and writes one file."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint.place import run_place
from runner.checkpoint_verbs import closing, place_of
from runner.command import say
from runner.durable import disk, scratch, write_text
from runner.errors import UsageError
from runner.job_words import refuse_missing_run, split
from runner.report import render, stored, view
from runner.report.compare import Comparison, compare
from runner.report.read import Run, is_run, read
from runner.settings import resolve
from runner.supervisor.progress import printable

NAME = "report.html"
"""In a run's folder."""

_WIDEST = 44
"""Characters of a cell on a terminal."""


@dataclass(frozen=True)
class Source:
    """Where a run is."""

    folder: Path | None
    uri: str | None


def report(arguments: argparse.Namespace) -> int:
    """Write the report of one run, or the comparison of several. Returns 0.

    Raises:
        UsageError: the words name no run.
        DataError: what they name is none, or its store has not ended.
        JobError: a job that they name is wrong.
        StorageError, AccessDenied: the disk, or the store.
    """
    arguments.kms_key_id, arguments.allow_unfenced = None, False
    return closing(_report)(arguments)


def _report(arguments: argparse.Namespace) -> int:
    sources = named(arguments.words, arguments.runs)
    runs = [_read(source, arguments) for source in sources]
    if len(runs) == 1:
        file = arguments.to or _own_file(sources[0], runs[0])
        page = view.page(runs[0])
        write(file, render.html(page))
        say(printable(f"{runs[0].name}: {page.verdict.word}. {page.verdict.sentence}\nreport: {file}"))
        return 0
    found = compare(runs)
    file = arguments.to or Path(f"report-{'-vs-'.join(map(_file_name, found.labels))}.html")
    write(file, render.comparison(found))
    say(printable("\n".join([*table(found), "", f"report: {file}"])))
    return 0


def named(words: Sequence[str], runs: Path) -> list[Source]:
    """The runs that the words of a command line name.

    words                        runs
    runs/a                       that folder
    s3://bucket/prefix/a         that store
    a.yaml                       runs/<its name>, or its store if that is no run
    a.yaml name=b                the same, of the job with that change
    (nothing)                    of JOB_FILE or JOB_YAML
    runs/a b.yaml s3://...       each of them
    runs/a name=b                refused

    Raises:
        UsageError: overrides beside something that is no job, or beside several.
    """
    files, overrides = _parted(words)
    if not files:
        return [_of_job(None, overrides, runs)]
    if overrides and (len(files) > 1 or _is_place(files[0])):
        raise UsageError(
            f"report: {' '.join(overrides)}: values change a job, and there "
            f"{'are several runs' if len(files) > 1 else 'is none'}\n"
            "    remedy: name one job file with them, or the folders of the runs without"
        )
    return [_of_place(word) if _is_place(word) else _of_job(word, overrides, runs) for word in files]


def write(file: Path, html: str) -> None:
    """Replace a report, whole."""
    with disk("write the report", file):
        write_text(file, html)


def table(found: Comparison) -> list[str]:
    """A comparison as lines for a terminal: what differs, then what came of it."""
    head = ["", *found.labels]
    lines = [[row.name, *row.cells] for row in found.job] or [["nothing differs but the name"]]
    outcome = [[row.name, *row.cells] for row in found.outcome]
    every = [head, *(line for line in (*lines, *outcome) if len(line) > 1)]
    widths = [max(len(_short(line[column])) for line in every) for column in range(len(head))]
    return [
        _line(head, widths),
        *(_line(line, widths) for line in lines),
        "",
        *(_line(line, widths) for line in outcome),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (f"{_short(cell):<{width}}" for cell, width in zip(cells, widths, strict=False))
    return "  ".join(padded).rstrip()


def _short(cell: str) -> str:
    cell = cell.replace("\n", " ")
    return cell if len(cell) <= _WIDEST else f"{cell[: _WIDEST - 1]}…"


def _parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    overrides = split([word for word in words if re.match(r"[^/\\=]*=", word)])[1]
    return [word for word in words if word not in overrides], overrides


def _is_place(word: str) -> bool:
    return "://" in word or Path(word).expanduser().is_dir()


def _of_place(word: str) -> Source:
    return Source(None, word) if "://" in word else Source(Path(word).expanduser(), None)


def _of_job(file: str | None, overrides: list[str], runs: Path) -> Source:
    refuse_missing_run("report", file)
    job = resolve(file, overrides, os.environ).job
    folder = runs / job.name
    if not is_run(folder) and job.checkpoints.uri is not None:
        return Source(None, run_place(job.checkpoints.uri, job.name, folder.absolute()))
    return Source(folder, None)


def _read(source: Source, arguments: argparse.Namespace) -> Run:
    if source.folder is not None:
        return read(source.folder)
    arguments.uri = source.uri
    store = place_of(arguments).store()
    with scratch("read a run from its store") as folder:
        return read(stored.fetch(store, folder), store.place, done=True)


def _own_file(source: Source, run: Run) -> Path:
    return Path(f"report-{_file_name(run.name)}.html") if source.folder is None else source.folder / NAME


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
