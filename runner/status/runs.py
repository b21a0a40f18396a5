"""Finds runs and reads where each stands: on this machine, in a folder of runs, under an address in S3.

    runs            each folder is a run, with its store in `checkpoints/` or where its job.yaml says
    /mnt/runs       a folder that jobs name in `checkpoints.uri`: each folder in it is the store of a run
    s3://bucket/x   the same in a bucket
    one run         by any of its addresses; it is the only one then

Two requests a run, several runs at a time. What is wrong with one run is said in its row, and a bucket that
was silent for one is not asked about the next. Nothing is written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from runner.checkpoint.find import holds_run
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import BLOBS, HEAD, MANIFESTS
from runner.checkpoint.lease import decoded, refuse_headless
from runner.checkpoint.place import open_store
from runner.checkpoint.s3 import S3Store
from runner.checkpoint.store import BootClock, Patience, Store
from runner.command import complain
from runner.durable import disk
from runner.errors import DataError, JobError, RunnerError, StorageError, UsageError
from runner.run_words import kept
from runner.status.rows import Row, Size, of_standing, of_trouble
from runner.status.standing import standing

PATIENCE = 10.0
"""Seconds that a silent bucket is waited for. There may be more rows than this one."""

TOGETHER = 16
"""Runs that are read at once: as many connections as a client of S3 has here."""

COUNTED = 10_000
"""Most files of a folder whose sizes are added up."""

_OF_A_RUN = (".lock", "job.yaml", "run.json", "result.json")


class Runs:
    """All the places that a person asks about; use as `with contextlib.closing(Runs(...)) as runs`.

    Args:
        owner: account that must own the buckets; None: not checked.
    """

    def __init__(self, owner: str | None) -> None:
        self._owner = owner
        self._buckets: dict[str, S3Store] = {}
        self._silent: dict[str, StorageError] = {}
        self._lock = threading.Lock()
        self._patience = Patience(
            PATIENCE, BootClock(), lambda event: complain(f"waiting for the store: {event['message']}")
        )

    def at(self, place: str) -> list[Row]:
        """The runs of a place.

        Raises:
            UsageError: an address that leads nowhere.
            DataError: there is no such folder.
            AccessDenied, StorageError: one may not look, or nobody answers.
        """
        if "://" in place and not place.startswith("file://"):
            return self._in_bucket(place.rstrip("/"))
        folder = Path(place.removeprefix("file://")).expanduser().absolute()
        if not folder.is_dir():
            reason = "no such folder; remedy: name a folder of runs, or s3://bucket/prefix"
            raise DataError(f"list {place}: {reason}")
        one = self._of_folder(folder, place)
        if one is not None:
            return [one]
        with disk("list the runs", folder):
            below = sorted(child.name for child in folder.iterdir() if child.is_dir())
        return self._all(lambda name: self._of_folder(folder / name, str(Path(place) / name)), below)

    def close(self) -> None:
        """Give connections back."""
        for bucket in self._buckets.values():
            bucket.close()

    def _all(self, read: Callable[[str], Row | None], names: list[str]) -> list[Row]:
        with ThreadPoolExecutor(TOGETHER, "list") as pool:
            return [row for row in pool.map(read, names) if row is not None]

    def _in_bucket(self, uri: str) -> list[Row]:
        names = list(self._bucket(uri).folders())
        if {MANIFESTS.rstrip("/"), BLOBS.rstrip("/")} & set(names):
            uri, _, name = uri.rpartition("/")
            names = [name]
        return self._all(lambda name: self._of_bucket(uri, name, f"{uri}/{name}"), names)

    def _of_bucket(self, uri: str, name: str, where: str, size: Size | None = None) -> Row | None:
        """A run in a bucket; None where there is none.

        Args:
            size: None: that in the bucket.
        """

        def row() -> Row | None:
            if uri in self._silent:
                raise self._silent[uri]
            try:
                store = self._bucket(uri).below(name)
                return _read(store, name, where, lambda: size or Size(*store.extent("")))
            except StorageError as error:
                self._silent.setdefault(uri, error)
                raise

        return _or_trouble(row, name, where, f"{uri}/{name}")

    def _of_folder(self, folder: Path, where: str) -> Row | None:
        """A run in a folder: a store, or what a machine has of a run; None where there is neither."""

        def row() -> Row | None:
            elsewhere = kept(folder)
            if elsewhere is not None and (found := self._elsewhere(elsewhere[0], folder, where)) is not None:
                return found
            for store in (FolderStore(folder), FolderStore(folder / "checkpoints")):
                if holds_run(store):
                    return _read(store, folder.name, where, lambda: size_of(folder))
            if not any((folder / name).exists() for name in _OF_A_RUN):
                return None
            # It failed before it took the run, or only evaluated.
            return of_trouble(folder.name, where, str(folder), "empty", None)

        return _or_trouble(row, folder.name, where, str(folder))

    def _elsewhere(self, place: str, folder: Path, where: str) -> Row | None:
        """A run of this machine with its checkpoints in another place."""
        uri, _, name = place.rpartition("/")
        size = size_of(folder)
        if uri.startswith("s3://"):
            return self._of_bucket(uri, name, where, size)
        return _read(FolderStore(Path(place.removeprefix("file://"))), name, where, lambda: size)

    def _bucket(self, uri: str) -> S3Store:
        with self._lock:
            if uri not in self._buckets:
                try:
                    store = open_store(uri, self._patience, bucket_owner=self._owner, of_runs=True)
                except JobError as error:
                    problem = error.problems[0]
                    raise UsageError(f"{problem.reason}\n    remedy: {problem.remedy}") from error
                self._buckets[uri] = cast(S3Store, store)
            return self._buckets[uri]


def size_of(folder: Path) -> Size:
    """Bytes of a folder's files, each once whatever its names, of at most `COUNTED`."""
    seen: set[tuple[int, int]] = set()
    total, count = 0, 0
    for at, _, names in os.walk(folder):
        for name in names:
            if (count := count + 1) > COUNTED:
                return Size(total, False)
            try:
                found = (Path(at) / name).lstat()
            except FileNotFoundError:  # a live run's
                continue
            if (file := (found.st_dev, found.st_ino)) not in seen:
                seen.add(file)
                total += found.st_size
    return Size(total, True)


def _read(store: Store, name: str, where: str, size: Callable[[], Size]) -> Row | None:
    """The row of a store; None where it has no run."""
    if (held := store.read(HEAD)) is None:
        refuse_headless(store)
        return None
    here = standing(decoded(store, held), held.age, None, ())
    try:
        found = size()
    except RunnerError:  # who may read and not list; the run is there all the same
        found = None
    return of_standing(name, where, store.place, here, found)


def _or_trouble(read: Callable[[], Row | None], name: str, where: str, place: str) -> Row | None:
    try:
        return read()
    except RunnerError as error:
        return of_trouble(name, where, place, error, str(error))
