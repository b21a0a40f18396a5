"""The run in its store, as one supervisor has it: opened, taken, restored, shipped, given back.

    open -> identity -> take -> restore -> leftovers -> (attempts; `runner.checkpoint.ship` works) -> close

Nothing here starts a trainer. Waiting for a store is done so that a notice ends it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from runner.checkpoint.collect import GRACE, Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import Sealed, read, verify
from runner.checkpoint.head import HEAD, IDENTITY, RENEW_EVERY, TTL, Entry, Head, Owner, decode
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.place import open_store, run_place
from runner.checkpoint.restore import download, restore
from runner.checkpoint.ship import EventParts, Holding, Shipper
from runner.checkpoint.store import Interruptible, Patience, probe, understood, unfit
from runner.durable import disk, write_text
from runner.errors import DataError, Preempted, RunnerError, StorageError
from runner.manifest import Job
from runner.supervisor import identity
from runner.supervisor.identity import Identity, Place
from runner.supervisor.journal import Journal
from runner.supervisor.notices import Notices
from runner.supervisor.run_folder import RunFolder

LOOK = 0.2
"""Seconds between two looks at notices while something is waited for."""

SHORT = 1.0
"""Seconds that a lease may take before its waiter does something useful meanwhile."""

LAST = 10.0
"""Seconds that a silent store is waited for after a second notice."""

JOB_IDS = ("RUNNER_JOB_UID", "AWS_BATCH_JOB_ID", "SLURM_JOB_ID")
"""Variables that name the orchestrator's job, the first that is set: its processes are siblings."""


T = TypeVar("T")


class Custody:
    """One supervisor's hold on one run.

    Args:
        lock: name of the run folder's lock, which this process holds.
        geometry: how the global batch is cut now.
        memory_peak: the trainer's most, as a share of the limit.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        lock: str | None,
        notices: Notices,
        journal: Journal,
        *,
        geometry: Callable[[], Mapping[str, Any]],
        memory_peak: Callable[[], float | None],
    ) -> None:
        self._job = job
        self._folder = folder
        self._lock = lock
        self._notices = notices
        self._journal = journal
        self._geometry = geometry
        self._memory_peak = memory_peak
        settings = job.checkpoints
        self._clock = Interruptible()
        self._patience = patience = Patience(settings.patience_seconds, self._clock, journal.say)
        self.place = Place(run_place(settings.uri, job.name, folder.path), folder.path)
        store = open_store(
            self.place.store,
            patience,
            fenced=not settings.allow_unfenced,
            kms_key=settings.kms_key_id,
            bucket_owner=settings.expected_bucket_owner,
        )
        owner = Owner(
            attempt=uuid.uuid4().hex,
            host=socket.gethostname(),
            job=next((os.environ[name] for name in JOB_IDS if os.environ.get(name)), None),
            lock=lock,
        )
        lease = Lease(store, owner, self._clock, patience, TTL, self._along)
        manifests = Manifests(store, journal.say)
        committer = Committer(store, lease, manifests, settings.keep_last)
        # In the run's own folder nobody reads who could not pin.
        grace = 0.0 if settings.uri is None else GRACE
        collector = Collector(store, lease, manifests, committer, self._clock, grace)
        self._holding = Holding(store, lease, manifests, committer, collector)
        self._events = EventParts(folder.events, journal.size)
        self.shipper = Shipper(
            self._holding,
            folder.newest,
            self._events,
            say=journal.say,
            wake=notices.wake,
            renew_every=RENEW_EVERY,
        )
        self.taken = False
        """Whether the run is ours."""

    @property
    def newest(self) -> Entry | None:
        """The head checkpoint; None before there is one."""
        return self._holding.lease.head.newest if self.taken else None

    @property
    def epoch(self) -> int:
        """This owner's."""
        return self._holding.lease.head.epoch

    @property
    def head(self) -> Head:
        """The state of the run, as last confirmed."""
        return self._holding.lease.head

    @property
    def predecessor(self) -> Head | None:
        """The state of the run when it was taken over; None of one that begins."""
        return self._holding.lease.predecessor

    # --- before the run is ours ---

    def identity(self) -> Identity | None:
        """What makes the run this run, from its store; None if it has not begun.

        Raises:
            DataError: the run began elsewhere, or what was here is gone.
        """
        store = self._holding.store
        place = f"{store.place}/{IDENTITY}"
        found = self._call(
            lambda: understood(
                store, IDENTITY, lambda read: identity.decode(read.data, place), self._patience
            )
        )
        if found is not None:
            return found[1]
        here = identity.read(self._folder.identity)
        if here is not None:
            before = (here.job.get("checkpoints") or {}).get("uri")
            began = run_place(before, self._job.name, self._folder.path)
            if began == store.place:
                raise self._unidentified()
            raise DataError(
                f"{store.place}: nothing is there of the run that {self._folder.path} belongs to, which "
                f"began with checkpoints in {began}; remedy: set checkpoints.uri back, copy what is there to "
                f"its new place, or, to start over, {self.place.remedy}"
            )
        return None

    def is_done(self) -> bool:
        """Whether the run is known to be done; it never begins again."""
        store = self._holding.store
        with contextlib.suppress(DataError):  # what is wrong with it is said by whoever takes it
            found = self._call(
                lambda: understood(store, HEAD, lambda read: decode(Head, read.data, HEAD), self._patience)
            )
            return found is not None and found[1].state == "done"
        return False

    def probe(self) -> None:
        """Make sure that the store keeps its conditions and lets us do all that the last step needs.

        Raises:
            JobError: it cannot keep two writers apart, and the job does not allow that.
            AccessDenied, StorageError: it cannot be used at all.
        """
        store = self._holding.store
        if self._job.checkpoints.uri is None:
            return  # the first write tells
        if self._job.checkpoints.allow_unfenced:
            text = f"{store.place} is used unfenced: nothing but you keeps two commands off this run"
            self._journal.say({"event": "warning", "message": text})
        elif (wrong := self._call(lambda: self._patience.run(lambda: probe(store)))) is not None:
            raise unfit(store.place, wrong)

    def take(self, meanwhile: Callable[[Callable[[], str | None]], None]) -> bool:
        """Become the owner. False when the run is done.

        Args:
            meanwhile: something useful to do while another owner may still live. It gets a function to call
                now and then, which raises when there is no use in going on.

        Raises:
            NotOwner, Preempted: another process works on the run, or a notice came.
            DataError: the state of the run is missing or damaged.
        """
        return self._call(self._take, meanwhile)

    def _take(self) -> bool:
        """Take, and renew from then on: what is done meanwhile may last longer than the lease."""
        if not self._holding.lease.take():
            return False
        self.taken = True
        before = self.predecessor
        here = before is not None and self._lock is not None and before.owner.lock == self._lock
        self._journal.resume(self.head.record, here, self._folder.events)
        self._prepare()
        self.shipper.start()
        self._journal.say({"event": "owner", "epoch": self.epoch, "place": self.place.store})
        return True

    def glance(self) -> str | None:
        """Look up from other work: show what was said, raise what ended the shipping."""
        self._journal.show()
        self.check()
        return None

    def _call(
        self, work: Callable[[], T], meanwhile: Callable[[Callable[[], str | None]], None] | None = None
    ) -> T:
        """Do what may have to wait for the store, so that a notice ends the waiting."""
        with ThreadPoolExecutor(1, "store") as pool:
            doing = pool.submit(work)

            def look() -> str | None:
                self._journal.show()
                if doing.done():
                    doing.result()
                return None

            try:
                if meanwhile is not None:
                    wait_for([doing], SHORT)
                    if not doing.done():
                        text = f"another owner of {self.place.store} may still live: waiting for it"
                        self._journal.line(text)
                        meanwhile(look)
                while not doing.done():
                    self._notices.poll()
                    if self._notices.first is not None:
                        raise Preempted(
                            f"{self._notices.first}: stopped while waiting for {self.place.store}; the same "
                            "command goes on"
                        )
                    look()
                    wait_for([doing], LOOK)
            finally:
                if not doing.done():
                    self._clock.end(Preempted("stopped while waiting for the store"))
            self._journal.show()
            return doing.result()

    # --- the run is ours ---

    def begin(self, new: Identity) -> Identity:
        """Write what makes the run this run; returns what is there, should somebody have been faster.

        Raises:
            DataError: the run has checkpoints, so it was there once.
        """
        if self.newest is not None:
            raise self._unidentified()
        data = identity.encode(new)
        self._call(lambda: self._holding.store.create(IDENTITY, data))
        # Read back: nothing replaces it, and what a store kept wrong is better known before the first step.
        found = self.identity()
        assert found is not None
        return found

    def _unidentified(self) -> DataError:
        return DataError(
            f"{self.place.store}: {IDENTITY} is missing, and it alone says what the checkpoints belong to; "
            f"remedy: put it back from a copy, as {self._folder.identity} of a machine that ran it; or, to "
            f"start over, {self.place.remedy}"
        )

    def mirror(self, stored: Identity) -> None:
        """Keep the copy on this machine."""
        with disk("write the run's identity", self._folder.identity):
            write_text(self._folder.identity, identity.encode(stored).decode())

    def renew(self) -> None:
        """Let `HEAD` know what is so now."""
        self._call(self._holding.lease.renew)

    def restore(self) -> Sealed | None:
        """The checkpoint to go on from, in `newest/`; None for a run that has none yet.

        Raises:
            DataError: there are checkpoints and none is whole.
        """
        holding = self._holding
        found = self._call(
            lambda: restore(
                holding.store, holding.lease, holding.manifests, self._folder.newest, self._journal.say
            )
        )
        if found is None:
            return None
        sealed, manifest = found
        holding.committer.trust(manifest)
        return sealed

    def _prepare(self) -> None:
        """Make the folders of this machine, and trust nothing in them that the store should vouch for."""
        with disk("create the run's folders", self._folder.path):
            shutil.rmtree(self._folder.newest, ignore_errors=True)
            self._folder.newest.mkdir()
            self._folder.outbox.mkdir(exist_ok=True)

    def leftovers(self) -> None:
        """Commit or remove what a former attempt on this machine published and nobody committed."""
        for folder in self._published():
            reason = self._call(partial(self._refusal, folder))  # it reads every byte
            if reason is None:
                self.shipper.offer(folder, "leftover")
                self.drain()
            else:
                with disk("remove a leftover", folder):
                    _remove(folder)
                self._journal.say({"event": "removed", "id": folder.name, "reason": reason})

    def offer_rest(self, deadline: float | None = None) -> None:
        """Commit what the trainer published in its last moment and did not live to tell."""
        self.drain(deadline)
        for folder in self._published():  # in the order of their steps: the newest replaces the others
            self.shipper.offer(folder)
        self.drain(deadline)

    def drain(self, deadline: float | None = None) -> None:
        """Wait until everything that was offered is in the store.

        Args:
            deadline: on the monotonic clock; a store that is silent then is not waited for any more. After a
                second notice it is `LAST` at most.

        Raises:
            RunnerError: what ended the shipping.
        """
        last: float | None = None
        while not self.shipper.idle:
            self._journal.show()
            self._notices.poll()
            if self._notices.hurry:
                self.shipper.forget_waiting()
                last = time.monotonic() + LAST if last is None else last
            if min(deadline or math.inf, last or math.inf) <= time.monotonic():
                self._clock.end(Preempted("no time is left, and the store does not have everything"))
            self.shipper.wait(LOOK)
        self._journal.show()
        self.check()

    def check(self) -> None:
        """Raise what ended the shipping, if anything did."""
        if self.shipper.failure is not None:
            raise self.shipper.failure

    def finish(self, folder: Path) -> None:
        """Commit what the run ends with, a sealed folder, and that it is done.

        Raises:
            Preempted: a second notice came first.
            DataError: the folder does not verify any more.
        """
        self.shipper.offer(folder, "final")
        self.drain()
        if self.head.state != "done":
            if self._notices.hurry:
                raise Preempted(
                    f"{self._notices.first}: stopped before the store had what the run ends with; the same "
                    "command goes on"
                )
            raise DataError(
                f"{folder}: what the run ends with changed while it was sent; remedy: let nobody write in "
                f"{self._folder.path}, and give the same command again"
            )

    def fetch_final(self, folder: Path) -> Path | None:
        """What a done run ended with, in a folder inside `folder`; None if that was not kept."""
        final = self.head.final
        if final is None:
            return None
        holding = self._holding
        return self._call(lambda: download(holding.store, holding.manifests.get(final), folder)).folder

    def close(self) -> None:
        """Send what is left, end the threads, and give the run back.

        A store that is silent is waited for no longer than the next owner would wait otherwise.
        """
        holding = self._holding
        if self.taken:
            if self.shipper.failure is not None:
                self._clock.end(self.shipper.failure)
            enough = StorageError("the store is silent")
            timer = threading.Timer(LAST if self._notices.hurry else TTL, self._clock.end, (enough,))
            timer.daemon = True
            timer.start()
            self.shipper.close(self._notices.poll)
            self._journal.show()
            if self.shipper.failure is None and self.head.state == "held":
                with ThreadPoolExecutor(1, "store") as pool:
                    doing = pool.submit(self._give_back)
                    while not doing.done():
                        self._notices.poll()
                        wait_for([doing], LOOK)
                try:
                    doing.result()
                except RunnerError as error:
                    text = f"the run is not given back, and its next owner waits for a minute: {error}"
                    self._journal.say({"event": "warning", "message": text})
            timer.cancel()
        holding.store.close()

    def _give_back(self) -> None:
        self._events.send(self._holding.store, self.epoch)
        self._holding.lease.release()

    def _published(self) -> list[Path]:
        with disk("read the outbox", self._folder.outbox):
            return sorted(self._folder.outbox.iterdir())

    def _refusal(self, folder: Path) -> str | None:
        """Why a leftover is not committed; None when it is whole and goes on from the head."""
        head = self.newest
        try:
            parent = read(folder).parent
            if head is not None and head.id == folder.name:
                return "it is committed already"
            if parent != (None if head is None else head.id):
                after = "the start" if head is None else head.id
                return f"it goes on from {parent or 'the start'}, and the head is {after}"
            verify(folder)
        except DataError as error:
            return str(error)
        return None

    def _along(self) -> dict[str, Any]:
        """What goes along with every swap of `HEAD`."""
        return {
            "record": self._journal.snapshot(),
            "memory_peak": self._memory_peak(),
            "events": self._events.newest or self.head.events,
            "geometry": dict(self._geometry()) or self.head.geometry,
        }


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
