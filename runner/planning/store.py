"""Whether the place of a run's checkpoints does: rights, conditional writes, room. Tried, and undone."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from runner.checkpoint.place import open_store, run_place
from runner.checkpoint.store import BootClock, Patience, Store, probe, unfit
from runner.durable import disk
from runner.errors import StorageError
from runner.manifest import Job

PATIENCE = 20.0
"""Seconds that a silent store is waited for at most: a person waits, and no work is at stake."""


def check_store(job: Job, run_folder: Path) -> None:
    """Try what the last step of a run will need.

        bucket    in the run's own place, which its rights may be bound to
        folder    in a folder beside it, on the same file system, that is removed again

    Args:
        run_folder: `runs/<name>`.

    Raises:
        JobError: it cannot keep two writers apart, and the job does not allow that.
        AccessDenied, StorageError: it cannot be used at all.
    """
    place = run_place(job.checkpoints.uri, job.name, run_folder)
    patience = Patience(min(job.checkpoints.patience_seconds, PATIENCE), BootClock(), lambda event: None)
    with _tried(job, place, patience) as store:
        if job.checkpoints.allow_unfenced:
            name = f"probe/{uuid.uuid4().hex}"
            store.create(name, b"first")
            store.delete(name)
        elif (wrong := patience.run(lambda: probe(store))) is not None:
            raise unfit(place, wrong)


def check_room(job: Job, run_folder: Path, checkpoint: int) -> None:
    """Whether a folder has room for what is kept, and one more that is being written.

    Args:
        checkpoint: bytes of one.

    Raises:
        StorageError: it has not.
    """
    folder = folder_of(run_place(job.checkpoints.uri, job.name, run_folder))
    if folder is None:
        return
    there = _there(folder)
    with disk("look at the free space", there):
        free = shutil.disk_usage(there).free
    needed = (job.checkpoints.keep_last + 1) * checkpoint
    if free < needed:
        raise StorageError(
            f"keep checkpoints in {folder}: {free:,} bytes are free, and {job.checkpoints.keep_last} "
            f"checkpoints and one that is being written need {needed:,}; remedy: free space there, name "
            "another place in checkpoints.uri, or keep fewer with checkpoints.keep_last"
        )


def folder_of(place: str) -> Path | None:
    """The folder that a place is; None of a bucket."""
    scheme, slashes, rest = place.partition("://")
    if slashes and scheme != "file":
        return None
    return Path(rest if slashes else place).expanduser().absolute()


@contextlib.contextmanager
def _tried(job: Job, place: str, patience: Patience) -> Iterator[Store]:
    settings = job.checkpoints
    folder = folder_of(place)
    beside = None if folder is None else _there(folder) / f".runner-plan-{uuid.uuid4().hex}"
    store = open_store(
        place if beside is None else str(beside),
        patience,
        fenced=not settings.allow_unfenced,
        kms_key=settings.kms_key_id,
        bucket_owner=settings.expected_bucket_owner,
    )
    try:
        with contextlib.closing(store):
            yield store
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(one for one in (folder, *folder.parents) if one.exists())
