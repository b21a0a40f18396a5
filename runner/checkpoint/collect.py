"""What is not retained any more is deleted: by the owner, between commits, after readers had their time.

    the swap drops it -> pins are listed -> `GRACE` -> its manifest is deleted, then blobs that nobody names

A collector may be paused anywhere, and wake up when another process owns the run. So it deletes nothing whose
epoch is above its own, and an owner relies on nothing of an earlier epoch that is not retained: what a zombie
deletes, nobody misses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from runner.checkpoint.commit import Committer
from runner.checkpoint.head import BLOBS, MANIFESTS, PINS, Entry, Pin, decode, epoch_of, is_blob, is_manifest
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.store import Clock, Store
from runner.errors import DataError

GRACE = 3600.0
"""Seconds that a reader without the right to pin has for a checkpoint that it has begun to read."""


def garbage(keys: Iterable[str], named: Collection[str], epoch: int) -> list[str]:
    """Which objects may be deleted.

    named by what is retained        epoch       deleted
    yes                              any         no
    no                               above own   no: their owner has taken this run over
    no                               others      yes

    Args:
        keys: of manifests or blobs.
        named: keys of retained manifests, or of their blobs.
        epoch: one's own.
    """
    return [key for key in keys if key not in named and epoch_of(key) <= epoch]


@dataclass(frozen=True)
class _Pinned:
    """A pin, and since when it has not changed on our own clock."""

    pin: Pin
    etag: str
    since: float


class Collector:
    """Deletes for one owner. Every method belongs to the thread that commits.

    Args:
        grace: seconds that readers have.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        manifests: Manifests,
        committer: Committer,
        clock: Clock,
        grace: float = GRACE,
    ) -> None:
        self._store = store
        self._lease = lease
        self._manifests = manifests
        self._committer = committer
        self._clock = clock
        self._grace = grace
        self._waiting: list[tuple[Entry, float]] = []
        """What was dropped, and when, oldest first."""
        self._sweep_at: float | None = clock.now() + grace
        """When everything that nobody names is old enough; None when that has been done."""
        self._pins: dict[str, _Pinned] = {}
        self._bad: tuple[str, ...] | None = None
        """What was bad at the last look."""

    def dropped(self, entries: Iterable[Entry]) -> None:
        """Take note of what a confirmed swap does not retain any more."""
        now = self._clock.now()
        self._waiting += [(entry, now) for entry in entries]

    def look(self) -> None:
        """See which pins change; one that does not change has ended after its time."""
        self._pinned()

    def collect(self) -> list[str]:
        """Delete what has waited long enough and is not pinned; once, also what killed owners left.

        Returns:
            Keys of what was deleted.

        Raises:
            NotOwner, Preempted: another process owns the run; nothing was deleted.
            DataError: a retained manifest cannot be read, so nobody knows what it needs.
        """
        now, bad = self._clock.now(), self._lease.head.bad
        if self._bad not in (None, bad):
            self._sweep_at = now + self._grace  # a restore took it out of what is retained, and told nobody
        self._bad = bad
        due = [entry for entry, since in self._waiting if now - since >= self._grace]
        sweep = self._sweep_at is not None and now >= self._sweep_at
        if not due and not sweep:
            return []
        self._lease.renew()
        pinned = self._pinned()
        due = [entry for entry in due if entry not in pinned]
        self._waiting = [(entry, since) for entry, since in self._waiting if entry not in due]
        needed = self._lease.head.needed
        kept = {*needed, *pinned, *(entry for entry, _ in self._waiting)}
        manifests, blobs = {entry.key for entry in kept}, self._blobs(needed, True) | self._blobs(kept, False)
        if sweep:
            self._sweep_at = None
            # Only keys of ours: folders of a console, or what a file system leaves, are none.
            deleted = self._delete(filter(is_manifest, self._store.keys(MANIFESTS)), manifests)
            old = self._delete(filter(is_blob, self._store.keys(BLOBS)), blobs)
            return [*deleted, *old, *self._ended_pins()]
        of_due = sorted(self._blobs(due, False))
        deleted = self._delete([entry.key for entry in due], manifests)
        return [*deleted, *self._delete(of_due, blobs), *self._ended_pins()]

    def _delete(self, keys: Iterable[str], named: Collection[str]) -> list[str]:
        deleted = garbage(keys, named, self._lease.head.epoch)
        for key in deleted:
            self._committer.forget(key)
            self._manifests.forget(key)
            self._store.delete(key)
        return deleted

    def _ended_pins(self) -> list[str]:
        """Delete pins whose time has passed; a reader that lives makes another."""
        now = self._clock.now()
        ended = [key for key, one in self._pins.items() if now - one.since >= one.pin.ttl_s]
        for key in ended:
            self._store.delete(key)
        return ended

    def _blobs(self, entries: Iterable[Entry], must: bool) -> set[str]:
        """What these checkpoints need. One that cannot be read needs nothing, unless it `must` be known."""
        keys: set[str] = set()
        for entry in entries:
            try:
                keys.update(blob.key for blob in self._manifests.get(entry).files.values())
            except DataError:
                if must:
                    raise
        return keys

    def _pinned(self) -> set[Entry]:
        """What readers hold."""
        now, seen = self._clock.now(), {}
        for key in self._store.keys(PINS):
            found = self._store.read(key)
            if found is None:
                continue
            before = self._pins.get(key)
            if before is None or before.etag != found.etag:
                try:
                    pin = decode(Pin, found.data, key)
                except DataError:  # nothing that a reader of ours wrote
                    continue
                before = _Pinned(pin, found.etag, now)
            seen[key] = before
        self._pins = seen
        return {one.pin.entry for one in seen.values() if now - one.since < one.pin.ttl_s}
