"""What the verbs that take a job have in common on the command line: JOB, and key=value."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from runner.errors import DataError, UsageError

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


def refuse_missing_run(verb: str, word: str | None) -> None:
    """A word that stands for a run, where a job may stand, and names nothing that is there.

    word                   there   answer
    runs/my-charts         yes     goes on
    runs/my-charts, name   no      refused here: a person means a run by it
    job.yaml, job.yml      no      goes on: who reads the job says what is wrong
    s3://..., none         -       goes on

    Raises:
        DataError: there is no such run.
    """
    if word is None or "://" in word or word.endswith((".yaml", ".yml")):
        return
    if not Path(word).expanduser().exists():
        raise DataError(
            f"{verb}: {word} is not there; remedy: name a run as its folder, runs/<name>, or its job file; "
            "runner list says which runs there are"
        )
