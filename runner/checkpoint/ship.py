"""Sends what is published while training goes on: two threads beside the one that watches the trainer.

    keeper    renews the lease
    sender    commits the newest offered folder, sends the newest events, deletes what has had its time

One checkpoint is under way at a time; a newer one replaces the one that waits. A committed folder is moved to
`here`, from which a restart on this machine goes on without asking the store. Whatever ends the work of a
thread is kept in `failure`, and is the watching thread's to raise.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.checkpoint.collect import Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import Sealed, move, verify
from runner.checkpoint.head import EVENTS, RENEW_EVERY, Entry
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.store import Store
from runner.durable import disk
from runner.errors import AccessDenied, DataError, RunnerError, StorageError

COLLECT_EVERY = 60.0
"""Seconds between two looks for what may be deleted, when nothing is sent."""

LOOK = 0.2
"""Seconds between two looks at something else while the threads end."""

EVENTS_AT_MOST = 4 << 20
"""Bytes of one part of the events."""

Kind = Literal["checkpoint", "leftover", "final"]
"""What a folder is: of this attempt, of a former one on this machine, or what the run ends with."""


@dataclass(frozen=True)
class Holding:
    """A run that this process owns, and the tools that work on its store."""

    store: Store
    lease: Lease
    manifests: Manifests
    committer: Committer
    collector: Collector


class EventParts:
    """Sends the lines of an events file in parts that are written once.

    Args:
        begin: bytes that are not sent: of supervisors before this one.
    """

    def __init__(self, file: Path, begin: int) -> None:
        self._file = file
        self._sent = begin
        self._number = 0
        self.newest: str | None = None
        """Key of the newest part."""

    def send(self, store: Store, epoch: int) -> None:
        """Send the lines that are complete by now."""
        with disk("read the events", self._file), self._file.open("rb") as file:
            file.seek(self._sent)
            data = file.read(EVENTS_AT_MOST)
        data = data[: data.rfind(b"\n") + 1]
        if data:
            key = f"{EVENTS}{epoch:06d}-{self._number:06d}.jsonl"
            store.create(key, data)
            self.newest, self._sent, self._number = key, self._sent + len(data), self._number + 1


class Shipper:
    """The threads and their queue.

    Args:
        here: folder of the newest committed checkpoint on this machine.
        say: takes events from any thread.
        wake: called when the watching thread should look.
    """

    def __init__(
        self,
        holding: Holding,
        here: Path,
        events: EventParts,
        *,
        say: Callable[[Mapping[str, Any]], None],
        wake: Callable[[], None],
        renew_every: float = RENEW_EVERY,
    ) -> None:
        self._holding = holding
        self._here = here
        self._events = events
        self._say = say
        self._wake = wake
        self._renew_every = renew_every
        self._changed = threading.Condition()
        self._waiting: tuple[Path, Kind] | None = None
        self._under_way: tuple[Path, Kind] | None = None
        self._closing = False
        self.failure: RunnerError | None = None
        """Why nothing is sent any more."""
        self._commits: list[tuple[Entry, float]] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True, name=name)
            for name, work in (("keeper", self._keep), ("sender", self._send))
        ]

    def start(self) -> None:
        """Begin to renew and to send."""
        for thread in self._threads:
            thread.start()

    def offer(self, folder: Path, kind: Kind = "checkpoint") -> None:
        """Take a published folder; one that still waits is given up for it."""
        with self._changed:
            if any(held is not None and held[0] == folder for held in (self._waiting, self._under_way)):
                return
            given_up, self._waiting = self._waiting, (folder, kind)
            self._changed.notify_all()
        if given_up is not None:
            shutil.rmtree(given_up[0], ignore_errors=True)
            self._say({"event": "replaced", "id": given_up[0].name, "by": folder.name})

    @property
    def idle(self) -> bool:
        """Whether everything that was offered is committed, or never will be."""
        with self._changed:
            return self.failure is not None or (self._waiting is None and self._under_way is None)

    def wait(self, seconds: float) -> None:
        """Wait for something to change, at most so long."""
        with self._changed:
            self._changed.wait(seconds)

    def forget_waiting(self) -> None:
        """Leave where it is what is not under way yet."""
        with self._changed:
            self._waiting = None

    def committed(self) -> list[tuple[Entry, float]]:
        """What was committed since the last call, with the seconds that each took."""
        with self._changed:
            taken, self._commits = self._commits, []
        return taken

    def close(self, look: Callable[[], object] = lambda: None) -> None:
        """End both threads, after what was offered.

        Args:
            look: called now and then meanwhile.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(LOOK)
                look()

    # --- the threads ---

    def _guarded(self, work: Callable[[], None]) -> None:
        failure: RunnerError | None = RunnerError("a thread that ships checkpoints ended by a defect of ours")
        try:
            work()
            failure = None
        except RunnerError as error:
            failure = error
        finally:
            if failure is not None:
                with self._changed:
                    self.failure = self.failure or failure
                    self._closing = True
                    self._changed.notify_all()
            self._wake()

    def _keep(self) -> None:
        while not self._wait(lambda: False, self._renew_every):
            self._holding.lease.renew()

    def _send(self) -> None:
        collect_at = time.monotonic() + COLLECT_EVERY
        while True:
            closing = self._wait(lambda: self._waiting is not None, max(0.0, collect_at - time.monotonic()))
            with self._changed:
                taken, self._waiting = self._waiting, None
                self._under_way = taken
            if taken is not None:
                self._commit(*taken)  # one that fails stays under way: it is `failure` that ends it
                with self._changed:
                    self._under_way = None
                    self._changed.notify_all()
                self._wake()
            elif closing:
                return
            if taken is not None or time.monotonic() >= collect_at:
                self._collect()
                collect_at = time.monotonic() + COLLECT_EVERY

    def _wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Sleep until there is something to do; True when it is time to leave."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or until(), seconds)
            return self._closing

    def _commit(self, folder: Path, kind: Kind) -> None:
        began = time.monotonic()
        try:
            sealed = verify(folder)
            if sealed.id != folder.name:
                raise DataError(f"checkpoint {folder.name}: its manifest says that it is {sealed.id}")
        except DataError as error:
            # The disk, between the trainer's hand and ours. The checkpoint before it still stands.
            self._say({"event": "warning", "message": f"not committed: {error}"})
            shutil.rmtree(folder, ignore_errors=True)
            return
        holding = self._holding
        self._events.send(holding.store, holding.lease.head.epoch)
        if kind == "final":
            holding.committer.finish(sealed)
            with self._changed:
                self._closing = True  # nobody renews a run that is done
                self._changed.notify_all()
            return
        entry, dropped = holding.committer.commit(sealed)
        seconds = time.monotonic() - began
        self._keep_here(sealed)
        holding.collector.dropped(dropped)
        with self._changed:
            self._commits.append((entry, seconds))
        said = {"event": "commit", "id": sealed.id, "step": sealed.step, "leftover": kind == "leftover"}
        self._say({**said, "seconds": round(seconds, 3)})

    def _keep_here(self, sealed: Sealed) -> None:
        with disk("keep the newest checkpoint", self._here):
            for old in self._here.iterdir():
                shutil.rmtree(old)
            move(sealed.folder, self._here / sealed.id)

    def _collect(self) -> None:
        """Delete what has had its time. A failure costs space, not the run."""
        try:
            self._holding.collector.collect()
        except (DataError, StorageError, AccessDenied) as error:
            self._say({"event": "warning", "message": f"delete old checkpoints: {error}"})
