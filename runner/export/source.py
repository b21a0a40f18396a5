"""What the run that a person named has to export: on this machine, or fetched from its store.

A run that was trained here and is done has it in its folder, any other in its store. A store of a done run
has the end of it, checked file by file; of any other the adapter of its newest committed checkpoint.
`--step` asks for the checkpoint of a step. What a run trained is said by its own `run.json`, not by a job
file that may have changed since.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from runner.checkpoint.find import head_of
from runner.checkpoint.head import IDENTITY
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.pull import Wish, pull, trained_step
from runner.checkpoint_verbs import place_of
from runner.command import complain
from runner.errors import DataError
from runner.manifest import Job
from runner.run_words import named
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
    run = named("export", arguments.words, arguments.runs)
    folder = None if run.folder is None else RunFolder(run.folder.absolute())
    if folder is not None:
        if (here := _ended_here(folder, arguments.step)) is not None:
            return here
        if not folder.path.is_dir() and not run.in_bucket:
            raise DataError(
                f"export: {folder.path} is not there; remedy: train the job first, name the folder of its "
                "runs with --runs, or the address of its checkpoints"
            )
    run.reach(arguments)
    return _from_store(arguments, work)


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
