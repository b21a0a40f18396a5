"""`runner list`: reads the runs of every place that was named, and prints them, for people or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path

from runner.command import complain, say
from runner.errors import RunnerError
from runner.status.rows import Row, document, newest_first, table
from runner.status.runs import Runs
from runner.supervisor.progress import printable

HERE = "runs"
"""Where `runner train` keeps runs, unless it is told otherwise."""


def list_runs(arguments: argparse.Namespace) -> int:
    """The verb. Returns 0 whatever the runs do, and whatever is wrong with one; else that of the first
    place that could not be listed, after the runs of the others."""
    places: list[str] = arguments.places or [HERE]
    rows: list[Row] = []
    code = 0
    with contextlib.closing(Runs(arguments.expected_bucket_owner)) as runs:
        for place in places:
            if place == HERE and not arguments.places and not Path(place).exists():
                continue  # nobody has trained here
            try:
                rows += runs.at(place)
            except RunnerError as error:
                complain(str(error))
                code = code or error.exit_code
    rows = newest_first(rows)
    if arguments.json:
        say(json.dumps(document(rows), indent=2, ensure_ascii=False))
        return code
    if rows:
        say(table(rows, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    elif not code:
        say(f"no runs in {', '.join(places)}")
    for row in rows:
        if row.problem is not None:
            complain(printable(f"{row.name}: {row.problem}"))
    return code
