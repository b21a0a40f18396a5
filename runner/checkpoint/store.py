"""The seam to an object store: few verbs, each with an answer for the reply that never came.

    create, create_file    a key is written once; True when this content is what it holds
    swap                   replace one object if it has not changed: the new etag, None when the swap is lost
    read, fetch            an object with its etag; a large one into a file
    keys, delete           keys by prefix; a key that is gone is deleted

`runner.checkpoint.s3` and `runner.checkpoint.folder` implement it, tests/test_store.py is the contract of
both. Keys are relative to the run. A failure that may pass is `Transient`; every verb but `swap` waits for it
to pass (`Patience`). `swap` answers at once, because only its caller knows which of its own writes it may
find afterwards (`runner.checkpoint.lease`).
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from runner.errors import DataError, JobError, Problem, RunnerError, StorageError

CREATORS = 12
"""Parallel creates of one key in the probe; a store that only looks before it writes lets several win."""

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 20.0
"""Seconds between two tries, doubled from the first to the longest."""

T = TypeVar("T")


class Transient(StorageError):
    """A call whose failure may pass, and whose effect is unknown.

    Args:
        final: what it becomes when it does not pass.
    """

    def __init__(self, final: RunnerError) -> None:
        self.final = final
        super().__init__(str(final))


class Missing(DataError):
    """An object that should be there is not."""


@dataclass(frozen=True)
class Object:
    """The content of a key, and the name of this version of it."""

    data: bytes
    etag: str
    age: float | None = field(default=None, compare=False)
    """Seconds since it was written, by the store's own clock; None where it does not say. For people."""


class Store(Protocol):
    """One run's place in a store."""

    place: str
    """For messages: the address of the run."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a key that nobody has written. True when it holds `data` now, whoever wrote it."""
        ...

    def create_file(self, key: str, path: Path, size: int, sha256: str) -> bool:
        """`create` from a file of this size and hexadecimal SHA-256, which nobody changes meanwhile."""
        ...

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        """Replace what has this etag; None: create it. Returns the new etag, None when it has changed.

        Raises:
            Transient: it may have happened, or may yet happen.
        """
        ...

    def read(self, key: str) -> Object | None:
        """The newest content of a key, None if there is none."""
        ...

    def fetch(self, key: str, path: Path, size: int) -> str:
        """Write an object into a file. Returns the file's SHA-256, hexadecimal, for the caller to judge.

        The file need not be synced: a copy is verified before it is used another time.

        Raises:
            Missing: no such key.
            DataError: it has another size.
        """
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys that begin so, in order."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key, or find it gone."""
        ...

    def close(self) -> None:
        """Give connections back."""
        ...


class Clock(Protocol):
    """Time that no wall clock disturbs."""

    def now(self) -> float:
        """Seconds; only differences matter."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; may raise to end the waiting."""
        ...


class BootClock:
    """CLOCK_BOOTTIME, which goes on while the machine sleeps: a lease does not wait for a lid to open."""

    def now(self) -> float:
        if sys.platform == "darwin":
            return time.clock_gettime(time.CLOCK_MONOTONIC)  # goes on as well, there
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Interruptible(BootClock):
    """A clock whose waits can be ended, once, by another thread."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._why: RunnerError | None = None

    def end(self, why: RunnerError) -> None:
        """Every wait, of now and of later, raises `why`."""
        self._why = self._why or why
        self._ended.set()

    def sleep(self, seconds: float) -> None:
        if self._ended.wait(seconds) and self._why is not None:
            raise self._why


class Patience:
    """Repeats a call until it answers, or the store has been silent for too long.

    Args:
        seconds: since the first failure of this call.
        say: takes an event about each failure.
    """

    def __init__(self, seconds: float, clock: Clock, say: Callable[[Mapping[str, Any]], None]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._say = say
        self._lock = threading.Lock()

    def run(self, call: Callable[[], T]) -> T:
        """The answer of `call`.

        Raises:
            RunnerError: `Transient.final` of the last failure; any other at once.
        """
        pause, began = FIRST_PAUSE, self._clock.now()
        while True:
            try:
                return call()
            except Transient as error:
                waited = self._clock.now() - began
                if waited + pause > self._seconds:
                    raise error.final from error
                self.note(error, waited)
            self._clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def check(self) -> None:
        """Raise what has ended the clock's waits, if anything has: before a part of long work."""
        self._clock.sleep(0)

    def note(self, error: Transient, waited: float = 0.0) -> None:
        """Tell of a failure; also of one that nobody has to wait for."""
        with self._lock:  # calls of several threads share one log
            self._say({"event": "store", "message": str(error), "waited": round(waited, 1)})


def understood(
    store: Store, key: str, decode: Callable[[Object], T], patience: Patience
) -> tuple[Object, T] | None:
    """An object and what it says, None if there is none. Read once more where it makes no sense: the way may
    be at fault.

    Raises:
        DataError: as `decode` does, of the second answer.
    """
    found = store.read(key)
    if found is None:
        return None
    try:
        return found, decode(found)
    except DataError as error:
        patience.note(Transient(error))
    found = store.read(key)
    return None if found is None else (found, decode(found))


def probe(store: Store) -> str | None:
    """Try whether a store keeps its conditions. None when it does, else what it did wrong.

    Also finds out whether this process may write, read and delete there.
    """
    name = f"probe/{uuid.uuid4().hex}"
    try:
        if not store.create(f"{name}/once", b"first") or store.create(f"{name}/once", b"second"):
            return "it let a key be created twice"
        etag = store.swap(f"{name}/swap", b"first", None)
        if etag is None or store.swap(f"{name}/swap", b"second", f"{etag[:-2]}x{etag[-1]}") is not None:
            return "it let an object be replaced under a wrong etag"
        with ThreadPoolExecutor(CREATORS) as pool:
            bodies = [f"{number}".encode() for number in range(CREATORS)]
            winners = sum(pool.map(lambda body: store.create(f"{name}/race", body), bodies))
        return None if winners == 1 else f"{winners} of {CREATORS} creations of one key at once succeeded"
    finally:
        for key in ("once", "swap", "race"):
            store.delete(f"{name}/{key}")


def unfit(place: str, reason: str) -> JobError:
    """The refusal of a store that cannot fence a second writer."""
    remedy = (
        "use a store with conditional writes (If-Match, If-None-Match), or a folder on a file system with "
        "hard links; checkpoints.allow_unfenced: true goes on without protection from a second writer"
    )
    return JobError([Problem("checkpoints.uri", f"{place} cannot keep two writers apart: {reason}", remedy)])
