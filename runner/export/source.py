"""Which run a person means, and what it has to export: on this machine, or fetched from its store.

    given            that is                               trained here, and done    else
    no word, a file  a job: runs/<name>                    runs/<name>/adapter       its store, by its job
    a folder         a run's, if it has a job.yaml         <folder>/adapter          its store, by its job
                     else a store, or a run's inside       -                         that store
    s3://, file://   a store                               -                         that store

A store of a done run has the end of it, checked file by file; of any other the adapter of its newest
committed checkpoint. `--step` asks for the checkpoint of a step. What a run trained is said by its own
`run.json`, not by a job file that may have changed since.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from runner.checkpoint.find import head_of
from runner.checkpoint.head import IDENTITY
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.place import run_place
from runner.checkpoint.pull import Wish, pull, trained_step
from runner.checkpoint_verbs import place_of
from runner.command import complain
from runner.errors import DataError, UsageError
from runner.job_words import refuse_missing_run, split
from runner.manifest import Checkpoints, Job
from runner.settings import resolve
from runner.supervisor import identity, result
from runner.supervisor.fetch import key
from runner.supervisor.hub import Kind
from runner.supervisor.identity import Identity
from runner.supervisor.result import Result
from runner.supervisor.run_folder import RunFolder

_AFTER = "after.predictions.jsonl"


@dataclass(frozen=True)
class Trained:
    """What a run has trained, on this machine."""

    folder: Path
    """An adapter, or a whole model."""
    whole: bool
    """Which of the two."""
    job: Job
    """Of the run."""
    identity: Identity
    step: int
    result: Result | None
    """Of a run that is done, if this is what it ended with."""
    recorded: Path | None
    """Its predictions with what this is."""

    def commit(self, kind: Kind, path: str, revision: str) -> str | None:
        """The commit of a hub repository that the run used; None of what is from nowhere else."""
        return self.identity.pins.get(key(kind, path, revision))


def find(arguments: argparse.Namespace, work: Path) -> Trained:
    """What the command line names.

    Args:
        arguments: `words`, `runs`, `step` and those of `runner.checkpoint_verbs.store_arguments`; stores that
            are opened are closed by its `opened`.
        work: a folder for what is fetched.

    Raises:
        UsageError: the words make no sense together.
        JobError: the job file is wrong.
        DataError: there is no run, or it has nothing to export.
        StorageError, AccessDenied: its store.
    """
    folder, settings = _named(arguments)
    if folder is None:
        return _from_store(arguments, work)
    if (here := _ended_here(folder, arguments.step)) is not None:
        return here
    if not folder.path.is_dir() and settings.uri is None:
        raise DataError(
            f"export: {folder.path} is not there; remedy: train the job first, name the folder of its runs "
            "with --runs, or the address of its checkpoints"
        )
    arguments.uri = run_place(settings.uri, folder.path.name, folder.path)
    arguments.kms_key_id = arguments.kms_key_id or settings.kms_key_id
    arguments.expected_bucket_owner = arguments.expected_bucket_owner or settings.expected_bucket_owner
    arguments.allow_unfenced = arguments.allow_unfenced or settings.allow_unfenced
    return _from_store(arguments, work)


def _named(arguments: argparse.Namespace) -> tuple[RunFolder | None, Checkpoints]:
    """The run's folder, which need not be there; None with `arguments.uri` set where a store was named."""
    words: list[str] = arguments.words
    file, overrides = split(words)
    if file is not None and ("://" in file or Path(file).expanduser().is_dir()):
        if overrides:
            raise UsageError(
                f"export: {overrides[0]} changes a job, and {file} is a run\n"
                "    remedy: leave it out: what a run trained is what it says"
            )
        path = Path(file).expanduser().absolute()
        if "://" in file or not (path / "job.yaml").is_file():
            arguments.uri = file
            return None, Checkpoints()
        folder = RunFolder(path)
        stored = identity.read(folder.identity)
        return folder, Checkpoints() if stored is None else _job(stored, str(path)).checkpoints
    refuse_missing_run("export", file)
    job = resolve(file, overrides, os.environ).job
    return RunFolder((arguments.runs / job.name).absolute()), job.checkpoints


def _ended_here(folder: RunFolder, step: int | None) -> Trained | None:
    """What a done run left in its folder; None if it is not done, or another step is wanted."""
    ended, stored = result.read(folder.result), identity.read(folder.identity)
    if ended is None or stored is None or ended.outcome != "done" or step not in (None, ended.exported_step):
        return None
    return _ended(folder.path, stored, ended)


def _ended(folder: Path, stored: Identity, ended: Result) -> Trained | None:
    """What lies in a run's folder, or in a copy of the end of a run."""
    for name in ("adapter", "model"):
        if (folder / name).is_dir():
            recorded = folder / "evaluation" / _AFTER
            return Trained(
                folder=folder / name,
                whole=name == "model",
                job=_job(stored, str(folder)),
                identity=stored,
                step=ended.exported_step,
                result=ended,
                recorded=recorded if recorded.is_file() else None,
            )
    return None


def _from_store(arguments: argparse.Namespace, work: Path) -> Trained:
    place, step = place_of(arguments), arguments.step
    store = place.store()
    final = head_of(store).final
    found = store.read(IDENTITY)
    if found is None:
        raise DataError(f"export: {store.place} has no {IDENTITY}, which says what its run trained")
    stored = identity.decode(found.data, f"{store.place}/{IDENTITY}")
    at_end = final is not None and step in (None, trained_step(final, Manifests(store).get(final)))
    wish = Wish(id=final.id, checkpoint=True) if final is not None and at_end else Wish(step=step)
    to = work / "pulled"

    def warn(line: str) -> None:
        complain(f"warning: {line}")

    done = pull(store, place.open(store.place), wish, to, warn)
    if not at_end:
        if final is None and step is None:
            warn(f"{store.place} is not done: exporting its newest checkpoint, step {done.entry.step}")
        return Trained(to, False, _job(stored, store.place), stored, done.entry.step, None, None)
    ended = result.read(to / "result.json")
    trained = None if ended is None else _ended(to, stored, ended)
    if trained is None:
        raise DataError(f"export: the end of the run in {store.place} holds neither adapter nor model")
    return trained


def _job(stored: Identity, place: str) -> Job:
    try:
        return Job.model_validate(stored.job)
    except ValidationError as error:
        raise DataError(
            f"export: the job of {place} is none that this version of the runner accepts; remedy: export it "
            "with the version that trained it"
        ) from error
