"""The verb: finds the runs that its words name, reads them, and writes one file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from runner.checkpoint_verbs import closing, place_of
from runner.command import say
from runner.durable import disk, scratch, write_text
from runner.errors import UsageError
from runner.job_words import split
from runner.report import render, stored, view
from runner.report.compare import Comparison, compare
from runner.report.read import Run, is_run, read
from runner.run_words import Named, named
from runner.supervisor.progress import printable

NAME = "report.html"
"""In a run's folder."""

_WIDEST = 44
"""Characters of a cell on a terminal."""


def report(arguments: argparse.Namespace) -> int:
    """Write the report of one run, or the comparison of several. Returns 0.

    Raises:
        UsageError: the words name no run.
        DataError: what they name is none, or its store has not ended.
        JobError: a job that they name is wrong.
        StorageError, AccessDenied: the disk, or the store.
    """
    return closing(_report)(arguments)


def _report(arguments: argparse.Namespace) -> int:
    given = named_runs(arguments.words, arguments.runs)
    runs = [_read(one, arguments) for one in given]
    if len(runs) == 1:
        file = arguments.to or _own_file(given[0], runs[0])
        page = view.page(runs[0])
        write(file, render.html(page))
        say(printable(f"{runs[0].name}: {page.verdict.word}. {page.verdict.sentence}\nreport: {file}"))
        return 0
    found = compare(runs)
    file = arguments.to or Path(f"report-{'-vs-'.join(map(_file_name, found.labels))}.html")
    write(file, render.comparison(found))
    say(printable("\n".join([*table(found), "", f"report: {file}"])))
    return 0


def named_runs(words: Sequence[str], runs: Path) -> list[Named]:
    """The runs that the words of a command line name: each that is no key=value one of them.

    Raises:
        UsageError: key=value beside several.
    """
    files, overrides = _parted(words)
    if overrides and len(files) > 1:
        raise UsageError(
            f"report: {' '.join(overrides)}: values change a job, and there are several runs\n"
            "    remedy: name one job file with them, or the folders of the runs without"
        )
    given = [[file, *overrides] for file in files] or [overrides]
    return [named("report", one, runs) for one in given]


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


def _folder(run: Named) -> Path | None:
    """Where a run is read on this machine; None: from its store."""
    if run.folder is None or is_run(run.folder) or (run.job is not None and not run.in_bucket):
        return run.folder
    return None


def _read(run: Named, arguments: argparse.Namespace) -> Run:
    if (folder := _folder(run)) is not None:
        return read(folder)
    run.reach(arguments)
    store = place_of(arguments).store()
    with scratch("read a run from its store") as work:
        return read(stored.fetch(store, work), store.place, done=True)


def _own_file(named_as: Named, run: Run) -> Path:
    folder = _folder(named_as)
    return Path(f"report-{_file_name(run.name)}.html") if folder is None else folder / NAME


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
