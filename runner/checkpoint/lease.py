"""The ownership of a run: `HEAD` is taken, renewed, changed and given back by swaps, and by nothing else.

    take      wait until nobody else owns the run, and begin a new epoch
    found     HEAD as anybody may read it
    write     swap HEAD for its successor: a renewal, a commit, a release

No wall clock decides anything. An owner is dead when `HEAD` has not changed for its ttl on the waiter's own
clock; an owner that slept through its ttl reads a higher epoch at its next swap and is fenced. A store that
does not answer fences nobody.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Any, Literal

from runner.checkpoint.head import (
    HEAD,
    MANIFESTS,
    TTL,
    Head,
    Owner,
    decode,
    encode,
    is_manifest,
    successor,
)
from runner.checkpoint.store import Clock, Object, Patience, Store, Transient, understood
from runner.errors import DataError, NotOwner, Preempted, RunnerError, StorageError

POLL = 5.0
"""Seconds between two looks of a waiter."""


class Claim(Enum):
    """What a process that wants a run does next."""

    CREATE = auto()
    TAKE = auto()
    WAIT = auto()
    LEAVE = auto()
    """The owner lives."""
    DONE = auto()
    GONE = auto()
    """Somebody deletes the run."""


class Fate(Enum):
    """What became of a swap that was not confirmed."""

    WON = auto()
    """`HEAD` is what one of our own swaps wrote."""
    NOTHING = auto()
    """`HEAD` is what it was."""
    FENCED = auto()


def claim(
    head: Head | None, renewed: bool, unchanged_for: float, lock: str | None, also: Collection[str] = ()
) -> Claim:
    """What to do about a run.

    HEAD       its owner's lock   changed while we waited   unchanged for   claim
    none       -                  -                         -               CREATE
    done       -                  -                         -               DONE; TAKE if it may be
    removing   -                  -                         -               GONE; as held if it may be taken
    released   -                  -                         -               TAKE
    held       we hold it         -                         -               TAKE: its owner is dead
    held       another            yes                       -               LEAVE
    held       another            no                        ttl and more    TAKE
    held       another            no                        less            WAIT

    Args:
        lock: the lock file that this process holds, as in `Owner.lock`.
        also: states, of done and removing, in which it may be taken.
    """
    if head is None:
        return Claim.CREATE
    if head.state == "done":
        return Claim.TAKE if "done" in also else Claim.DONE
    if head.state == "removing" and "removing" not in also:
        return Claim.GONE
    if head.state == "released" or (lock is not None and head.owner.lock == lock):
        return Claim.TAKE
    if renewed:
        return Claim.LEAVE
    return Claim.TAKE if unchanged_for >= head.ttl_s else Claim.WAIT


def fate(found: Head, same: bool, sent: Collection[str]) -> Fate:
    """What became of a swap, from the `HEAD` that was read afterwards.

    nonce         etag as before   fate
    one of ours   -                WON, also when an earlier swap arrived late
    another       yes              NOTHING: try again
    another       no               FENCED: by a higher epoch, or by a faster waiter for the same one

    Args:
        same: the etag is the one that the swap named.
        sent: nonces of the swaps since the last confirmed one.
    """
    if found.nonce in sent:
        return Fate.WON
    return Fate.NOTHING if same else Fate.FENCED


def found(store: Store) -> tuple[Head, str] | None:
    """`HEAD` and its etag. None when there is nothing of a run.

    Raises:
        DataError: it is damaged, or there are checkpoints without it; the message names the remedy.
        JobError: of a newer format.
    """
    held = store.read(HEAD)
    if held is None:
        refuse_headless(store)
        return None
    return decoded(store, held), held.etag


def refuse_headless(store: Store) -> None:
    """Where there is no `HEAD`: raise when there are checkpoints.

    Raises:
        DataError: there are.
    """
    for key in filter(is_manifest, store.keys(MANIFESTS)):
        raise DataError(
            f"{store.place}: {HEAD} is missing, but there are checkpoints; remedy: "
            f"runner checkpoints adopt {store.place}/{key} makes one of them the head"
        )


def decoded(store: Store, held: Object) -> Head:
    """`HEAD` that was read.

    Raises:
        DataError: it is damaged; the message names the remedy.
        JobError: of a newer format.
    """
    try:
        return decode(Head, held.data, f"{store.place}/{HEAD}")
    except DataError as error:
        raise DataError(
            f"{error}; remedy: put it back from a copy, or runner checkpoints adopt with the newest "
            f"manifest under {store.place}/{MANIFESTS}"
        ) from error


class Lease:
    """One process's hold on a run.

    Args:
        patience: how long a silent store is waited for.
        ttl: seconds that this owner promises to renew within.
        along: fields of `HEAD` that go with every swap of an owner, as they are at that moment.
    """

    def __init__(
        self,
        store: Store,
        owner: Owner,
        clock: Clock,
        patience: Patience,
        ttl: float = TTL,
        along: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._store = store
        self._owner = owner
        self._clock = clock
        self._patience = patience
        self._ttl = ttl
        self._along = along
        self._lock = threading.Lock()
        """One swap at a time: renewals and commits come from different threads."""
        self._head: Head | None = None
        self._etag: str | None = None
        self._sent: dict[str, Head] = {}
        """Swaps since the last confirmed one, by nonce."""
        self.predecessor: Head | None = None
        """`HEAD` as it was taken over; None of a run that began with this owner."""

    @property
    def head(self) -> Head:
        """`HEAD` as last confirmed; it is ours unless it is done."""
        if self._head is None:
            raise DataError("the run has not been taken")
        return self._head

    def take(self, also: Collection[str] = ()) -> bool:
        """Become the owner. False when the run is done already, and `head` says with what.

        Args:
            also: states in which the run may be taken, though nobody trains it any more: done, removing. It
                stays in that state, so that a kill leaves it there; and such a taker begins no run.

        Raises:
            NotOwner: another process works on the run.
            Preempted: it belongs to the same job of the orchestrator, which decides which one stays.
            DataError: the state of the run is missing or damaged.
        """
        first: str | None = None
        etag, since = None, self._clock.now()
        while True:
            found, head = self._read()
            if found is not None and found.etag != etag:
                etag, since = found.etag, self._clock.now()
                first = first or etag
            unchanged = self._clock.now() - since
            if head is None and also:
                raise DataError(f"{self._store.place}: the run has been removed")
            match claim(head, etag != first, unchanged, self._owner.lock, also):
                case Claim.DONE:
                    self._head = head
                    return False
                case Claim.CREATE | Claim.TAKE:
                    if self._begin(head, None if found is None else found.etag):
                        return True
                case Claim.LEAVE:
                    assert head is not None
                    raise self._foreign(head)
                case Claim.GONE:
                    place = self._store.place
                    raise DataError(
                        f"{place}: the run is being removed; remedy: runner checkpoints rm {place} "
                        "finishes that; or begin a new run under another name"
                    )
                case Claim.WAIT:
                    self._clock.sleep(POLL)

    def write(self, change: Callable[[Head], dict[str, Any]]) -> Head:
        """Swap `HEAD` for a successor, and return it confirmed.

        Args:
            change: the fields that differ, from the newest confirmed state; called again if that moves.

        Raises:
            NotOwner, Preempted: another process has taken the run.
            StorageError: the store stayed silent; whether it happened is unknown until the next write.
        """
        with self._lock:
            while True:
                new = successor(self.head, **{**self._along(), **change(self.head)})
                if self._swap(new, self._etag):
                    return new

    def renew(self) -> None:
        """Show that this owner lives."""
        self.write(lambda head: {})

    def release(self, state: Literal["released", "done"] = "released") -> None:
        """Give the run back, as `released` or as `done`; nothing may be written afterwards."""
        self.write(lambda head: {"state": state})

    def _begin(self, old: Head | None, etag: str | None) -> bool:
        """Try to swap in the next epoch."""
        if old is None:
            refuse_headless(self._store)
            new = Head(
                state="held", epoch=1, owner=self._owner, seq=1, nonce=uuid.uuid4().hex, ttl_s=self._ttl
            )
        else:
            state = "held" if old.state == "released" else old.state
            new = successor(old, state=state, epoch=old.epoch + 1, owner=self._owner, ttl_s=self._ttl)
        self._head, self._sent = new, {}
        self.predecessor = old
        try:
            return self._swap(new, etag)
        except (NotOwner, Preempted):
            return False  # another waiter was faster; the next look tells whether it lives

    def _swap(self, new: Head, etag: str | None) -> bool:
        """Swap once, and find out what became of it. Returns whether `HEAD` is `new` now.

        Otherwise it is what an earlier swap of ours wrote, whose answer was lost.
        """
        self._sent[new.nonce] = new
        found = self._patience.run(lambda: self._tried(new, etag))
        self._head = self._sent[decoded(self._store, found).nonce]
        self._etag, self._sent = found.etag, {}
        return self._head == new

    def _tried(self, new: Head, etag: str | None) -> Object:
        """`HEAD` as one of our swaps wrote it.

        Raises:
            Transient: nothing happened so far.
        """
        final: RunnerError = StorageError(
            f"{self._store.place}: {HEAD} does not change when it should; remedy: check the store"
        )
        data = encode(new)
        unanswered: Transient | None = None
        try:
            if (done := self._store.swap(HEAD, data, etag)) is not None:
                return Object(data, done)
        except Transient as error:
            unanswered, final = error, error.final
        found, head = self._read()
        if found is None or head is None:
            if etag is None:
                raise Transient(final)
            raise DataError(
                f"{self._store.place}: {HEAD} has vanished; remedy: find out who deletes there, then runner "
                "checkpoints adopt"
            )
        match fate(head, found.etag == etag, self._sent):
            case Fate.NOTHING:
                raise Transient(final)
            case Fate.FENCED:
                raise self._foreign(head)
            case Fate.WON:
                if unanswered is not None:
                    self._patience.note(unanswered)
                return found

    def _read(self) -> tuple[Object | None, Head | None]:
        return understood(self._store, HEAD, lambda held: decoded(self._store, held), self._patience) or (
            None,
            None,
        )

    def _foreign(self, head: Head) -> RunnerError:
        owner = head.owner
        said = f"{self._store.place}: epoch {head.epoch} belongs to {owner.attempt} on {owner.host}"
        if owner.job is not None and owner.job == self._owner.job:
            return Preempted(f"{said}, of the same job {owner.job}; it goes on there")
        return NotOwner(f"{said}; remedy: wait for it, or stop it and give the same command again")
