"""The words of a command line that stand for a run.

    words                      looked at here         its checkpoints
    job.yaml key=value         runs/<its name>        where the job says
    (nothing)                  of JOB_FILE or JOB_YAML, the same
    a folder                   that folder            there, if it is a store itself
                                                      else where its job.yaml says
                                                      else there, or in its checkpoints/
    s3://bucket/prefix/a       nothing                there

Nothing of it needs to exist but a folder that is named. key=value changes a job, and no run: beside a folder
or an address it is refused. A job may lie in a bucket, too: s3://bucket/job.yaml.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from runner.checkpoint.find import holds_run
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.place import run_place
from runner.durable import disk
from runner.errors import DataError, UsageError
from runner.job.yaml_source import LOADER
from runner.job_words import split
from runner.manifest import Checkpoints, Job
from runner.settings import resolve

_REACH = ("uri", "kms_key_id", "expected_bucket_owner", "allow_unfenced")
"""What opening a store needs of a job's `checkpoints`."""

_OF_JOBS = (".yaml", ".yml")
"""Ends of the names of job files."""


@dataclass(frozen=True)
class Named:
    """A run that a person named. Nothing is read of it before it is asked for."""

    folder: Path | None
    """On this machine, as it was named; it need not be there."""
    address: str | None
    """Of its store, where that was named."""
    job: Job | None
    """What named it, if a job did."""

    @property
    def place(self) -> str:
        """The address of its checkpoints.

        Raises:
            DataError: its job.yaml is none.
        """
        return self._kept()[0]

    @property
    def in_bucket(self) -> bool:
        """Whether a job that named it keeps its checkpoints elsewhere than in its folder."""
        return self.job is not None and self.job.checkpoints.uri is not None

    def reach(self, arguments: argparse.Namespace) -> None:
        """Have `runner.checkpoint_verbs.place_of` open its store; what the command line says comes first.

        Raises:
            DataError: its job.yaml is none.
        """
        arguments.uri, settings = self._kept()
        arguments.kms_key_id = arguments.kms_key_id or settings.kms_key_id
        arguments.expected_bucket_owner = arguments.expected_bucket_owner or settings.expected_bucket_owner
        arguments.allow_unfenced = arguments.allow_unfenced or settings.allow_unfenced

    def _kept(self) -> tuple[str, Checkpoints]:
        if self.folder is None:
            assert self.address is not None
            return self.address, Checkpoints()
        if self.job is not None:
            settings = self.job.checkpoints
            return run_place(settings.uri, self.job.name, self.folder.absolute()), settings
        return kept(self.folder) or (str(self.folder), Checkpoints())


def named(verb: str, words: Sequence[str], runs: Path) -> Named:
    """The run that the words name.

    Args:
        verb: for messages.
        runs: where runs are kept, for one that its job names.

    Raises:
        UsageError: the words make no sense together.
        JobError: the job is wrong.
        DataError: there is no such run.
    """
    word, overrides = split(list(words))
    if word is not None and _is_place(word):
        if overrides:
            raise UsageError(
                f"{verb}: {overrides[0]} changes a job, and {word} is a run\n"
                "    remedy: leave it out: a run is what its own job said"
            )
        return at(word)
    _refuse_missing(verb, word)
    job = resolve(word, overrides, os.environ).job
    return Named(runs / job.name, None, job)


def at(word: str) -> Named:
    """The run of an address or a folder."""
    return Named(None, word, None) if "://" in word else Named(Path(word).expanduser(), None, None)


def kept(folder: Path) -> tuple[str, Checkpoints] | None:
    """Where the run of a folder keeps its checkpoints, and how that is opened; None: in the folder.

    Raises:
        DataError: its job.yaml is none, and no checkpoints are in the folder.
    """
    file = folder / "job.yaml"
    if not file.is_file() or holds_run(FolderStore(folder.absolute())):
        return None
    with disk("read the job", file):
        text = file.read_text("utf-8", "replace")
    try:
        # All else of it may be another version's.
        job = yaml.load(text, Loader=LOADER)
        given = job.get("checkpoints") or {}
        checkpoints = Checkpoints.model_validate({key: given[key] for key in _REACH if key in given})
        if checkpoints.uri is None:
            return None
        return run_place(checkpoints.uri, str(job["name"]), folder), checkpoints
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValidationError) as error:
        if holds_run(FolderStore((folder / "checkpoints").absolute())):
            return None
        remedy = "name the address of its checkpoints, or give the run's command again, which writes it"
        raise DataError(f"{file}: cannot be read as a job; remedy: {remedy}") from error


def _is_place(word: str) -> bool:
    if "://" in word:
        return not word.endswith(_OF_JOBS)
    return Path(word).expanduser().is_dir()


def _refuse_missing(verb: str, word: str | None) -> None:
    """A word that stands for a run, where a job may stand, and names nothing that is there.

    word                          there   answer
    runs/my-charts, my-charts     no      refused here: a person means a run by it
    job.yaml, s3://.../job.yaml   no      goes on: who reads the job says what is wrong
    another file                  yes     goes on
    (nothing)                     -       goes on

    Raises:
        DataError: there is no such run.
    """
    if word is None or word.endswith(_OF_JOBS) or Path(word).expanduser().exists():
        return
    raise DataError(
        f"{verb}: {word} is not there; remedy: name a run as its folder, runs/<name>, or its job file; "
        "runner list says which runs there are"
    )
