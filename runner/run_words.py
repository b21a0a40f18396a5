"""The words of a command line that stand for a run.

    words                      folder                 its checkpoints
    job.yaml key=value         runs/<its name>        where the job says
    (nothing)                  of JOB_FILE or JOB_YAML, the same
    runs/a, a run's folder     runs/a                 where its job.yaml says
    another folder             none                   there
    s3://bucket/prefix/a       none                   there

Nothing of it needs to exist but a folder that is named. key=value changes a job, and no run: beside a folder
or an address it is refused.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from runner.checkpoint.place import run_place
from runner.durable import disk
from runner.errors import DataError, UsageError
from runner.job.yaml_source import LOADER
from runner.job_words import split
from runner.manifest import Checkpoints, Job

MARKS = ("run.json", "events.jsonl", "result.json")
"""Any of these makes a folder a run's. Not job.yaml, which lies in many a folder."""

_REACH = ("uri", "kms_key_id", "expected_bucket_owner", "allow_unfenced")
"""What opening a store needs of a job's `checkpoints`."""


@dataclass(frozen=True)
class Named:
    """A run that a person named."""

    folder: Path | None
    """On this machine, as it was named."""
    place: str
    """Address of its checkpoints."""
    settings: Checkpoints
    """How its store is opened; the defaults where nothing says."""
    job: Job | None
    """What named it, if a job did."""

    def reach(self, arguments: argparse.Namespace) -> None:
        """Have `runner.checkpoint_verbs.place_of` open its store; what the command line says comes first."""
        arguments.uri = self.place
        for key in _REACH[1:]:
            setattr(arguments, key, getattr(arguments, key, None) or getattr(self.settings, key))


def named(verb: str, words: Sequence[str], runs: Path) -> Named:
    """The run that the words name.

    Args:
        verb: for messages.
        runs: where runs are kept, for one that its job names.

    Raises:
        UsageError: the words make no sense together.
        JobError: the job is wrong.
        DataError: there is no such run, or its job.yaml is none.
    """
    word, overrides = split(list(words))
    if word is not None and is_place(word):
        if overrides:
            raise UsageError(
                f"{verb}: {overrides[0]} changes a job, and {word} is a run\n"
                "    remedy: leave it out: a run is what its own job said"
            )
        return at(word)
    _refuse_missing(verb, word)
    from runner.settings import resolve

    job = resolve(word, overrides, os.environ).job
    folder = runs / job.name
    return Named(folder, run_place(job.checkpoints.uri, job.name, folder.absolute()), job.checkpoints, job)


def is_place(word: str) -> bool:
    """Whether a word is an address, or a folder that is there."""
    return "://" in word or Path(word).expanduser().is_dir()


def at(word: str) -> Named:
    """The run of an address or a folder.

    Raises:
        DataError: its job.yaml is none.
    """
    folder = Path(word).expanduser()
    if "://" in word or not any((folder / name).is_file() for name in MARKS):
        return Named(None, word, Checkpoints(), None)
    if not (folder / "job.yaml").is_file():
        return Named(folder, word, Checkpoints(), None)
    name, settings = _kept(folder)
    return Named(folder, run_place(settings.uri, name, folder.absolute()), settings, None)


def kept_at(folder: Path) -> str | None:
    """Where the run of a folder `runs/<name>` keeps its checkpoints; None: there.

    Raises:
        DataError: its job.yaml is none.
    """
    if not (folder / "job.yaml").is_file():
        return None
    name, settings = _kept(folder)
    return None if settings.uri is None else run_place(settings.uri, name, folder)


def _kept(folder: Path) -> tuple[str, Checkpoints]:
    """The name of a run, and how its store is opened. All else of its job may be another version's."""
    file = folder / "job.yaml"
    with disk("read the job", file):
        text = file.read_text("utf-8", "replace")
    try:
        job = yaml.load(text, Loader=LOADER)
        settings = {key: job["checkpoints"][key] for key in _REACH if key in job["checkpoints"]}
        return str(job["name"]), Checkpoints.model_validate(settings)
    except (yaml.YAMLError, LookupError, TypeError, ValidationError) as error:
        remedy = "give the run's command again, which writes it"
        raise DataError(f"{file}: cannot be read as a job; remedy: {remedy}") from error


def _refuse_missing(verb: str, word: str | None) -> None:
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
