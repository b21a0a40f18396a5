"""What the verbs that take a job have in common on the command line: JOB, and key=value."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from runner.errors import UsageError

SOURCES = """\
JOB is a YAML file. Without it the job comes from JOB_FILE (a path or s3://) or JOB_YAML (the text itself).
Values, strongest first: key=value here, JOB__SECTION__KEY in the environment, the file, the default.
"""


def job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add JOB and key=value to a verb."""
    parser.description = f"{parser.description}\n\n{SOURCES}"
    parser.add_argument(
        "words", nargs="*", metavar="JOB key=value", help="the job file, and values that override it"
    )


def runs_argument(parser: argparse.ArgumentParser) -> None:
    """`--runs`, of every verb that finds a run by its name."""
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)"
    )


def split(words: list[str]) -> tuple[str | None, list[str]]:
    """The job file and the overrides. A word is an override when a key could stand before its first `=`.

    Raises:
        UsageError: there is more than one file.
    """
    overrides = [word for word in words if re.match(r"[^/\\=]*=", word)]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        raise UsageError(
            f"read the command line: {len(files)} job files, {', '.join(files)}\n"
            "    remedy: name one; write values as key=value, in quotes when they have blanks"
        )
    return (files[0] if files else None), overrides
