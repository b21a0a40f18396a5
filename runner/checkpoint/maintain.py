"""Deleting from a run that nobody trains: what nothing names, one checkpoint, or all of it.

Each takes the run as a supervisor would, so that a live one is refused, and gives it back as it was. A done
run stays done all the while.

    collect   wait the readers' grace, then delete what neither `HEAD` nor a pin names
    drop      one checkpoint out of `HEAD`; then collect
    remove    `HEAD` says `removing` -> manifests -> blobs -> everything else -> `HEAD`

A removal that is killed anywhere leaves a `HEAD` that says so: nobody takes the run for a fresh one or
restores what is left, and the next removal finishes it. Only when nothing is left does the name begin anew.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from runner.checkpoint.adopt import epoch_above, put, readable_head
from runner.checkpoint.collect import GRACE, Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.find import head_of
from runner.checkpoint.head import (
    BLOBS,
    EVENTS,
    HEAD,
    IDENTITY,
    MANIFESTS,
    PINS,
    RENEW_EVERY,
    RETAINED,
    Entry,
    Head,
    Owner,
    is_manifest,
)
from runner.checkpoint.inspect import keys_of, named, orphans
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.store import Clock, Patience, Store
from runner.errors import DataError, RunnerError, UsageError

_PARTS = (MANIFESTS, BLOBS, "parts/", PINS, EVENTS, "jobs/", "probe/", IDENTITY)
"""All that a run may have besides `HEAD`. Nothing else is deleted: other runs may lie below its place."""


@dataclass(frozen=True)
class Work:
    """What maintenance needs of its world."""

    store: Store
    clock: Clock
    patience: Patience
    say: Callable[[str], object]
    """Takes a line about what is waited for."""


def owner(verb: str) -> Owner:
    """This process, for `HEAD`."""
    return Owner(
        attempt=f"checkpoints-{verb}-{os.getpid()}-{uuid.uuid4().hex[:8]}", host=socket.gethostname()
    )


def taken(work: Work, verb: str, also: Collection[str]) -> tuple[Lease, Head]:
    """The run, taken by the rules, and `HEAD` as it was before.

    Raises:
        NotOwner: somebody works on it.
        DataError: there is no run, or its `HEAD` cannot be read.
    """
    before = head_of(work.store)
    if before.state in {"held", *also} - {"done"}:
        whose = f"{before.owner.attempt} on {before.owner.host}"
        work.say(f"held by {whose}: taken over if that does not renew within {before.ttl_s:.0f} s")
    lease = Lease(work.store, owner(verb), work.clock, work.patience)
    lease.take(also)
    return lease, before


def collect(work: Work, grace: float = GRACE) -> list[str]:
    """Delete what nothing names. Returns the deleted keys.

    Args:
        grace: seconds that are left to readers who have no pin.

    Raises:
        NotOwner: somebody works on the run.
        DataError: a retained manifest cannot be read, so nobody knows what it needs.
    """
    with _maintained(work, "gc") as lease:
        return _collected(work, lease, (), grace)


def drop(work: Work, id: str, grace: float = GRACE) -> list[str]:
    """Take one checkpoint out of `HEAD`, then `collect`.

    Raises:
        UsageError: it is the only one, or the end of the run.
        NotOwner, DataError: as `collect`; or it is not retained.
    """
    with _maintained(work, "rm") as lease:
        entry = named(work.store, lease.head, id)
        if entry not in lease.head.retained or len(lease.head.retained) == 1:
            what = "the last one" if entry in lease.head.retained else "the end of the run"
            raise UsageError(
                f"rm: checkpoint {id} of {work.store.place} is {what}\n"
                "    remedy: rm without --id removes the run"
            )
        lease.write(lambda head: {"retained": tuple(one for one in head.retained if one != entry)})
        return _collected(work, lease, (entry,), grace)


def remove(work: Work) -> list[str]:
    """Delete a whole run. Returns the deleted keys, `HEAD` last.

    Raises:
        NotOwner: somebody works on it, or another removal does.
        DataError: there is no run.
    """
    head, etag = readable_head(work.store)
    if head is None and (etag is not None or any(map(is_manifest, work.store.keys(MANIFESTS)))):
        put(work.store, _condemned(work.store), etag, work.patience)
    lease, _ = taken(work, "rm", ("done", "removing"))
    lease.write(lambda head: {"state": "removing", "retained": (), "final": None})
    deleted = []
    renewed = work.clock.now()
    for key in _all_keys(work.store):
        if work.clock.now() - renewed >= RENEW_EVERY:
            lease.renew()  # whoever was paused for longer than its ttl stops here
            renewed = work.clock.now()
        work.store.delete(key)
        deleted.append(key)
    return deleted


def _all_keys(store: Store) -> Iterator[str]:
    """In the order of deletion."""
    for prefix in _PARTS:
        yield from list(store.keys(prefix))
    yield HEAD


def _condemned(store: Store) -> Head:
    """A `HEAD` for a run that has none that can be read. Its ttl is over at once: nobody works there."""
    return Head(
        state="removing",
        epoch=epoch_above(store),
        owner=owner("rm"),
        seq=1,
        nonce=uuid.uuid4().hex,
        ttl_s=0,
    )


@contextlib.contextmanager
def _maintained(work: Work, verb: str) -> Iterator[Lease]:
    """Hold a run, and give it back as released, or as done if it was."""
    lease, _ = taken(work, verb, ("done",))
    try:
        yield lease
    except BaseException:
        with contextlib.suppress(RunnerError):  # or it is taken over after its ttl
            _give_back(lease)
        raise
    _give_back(lease)


def _give_back(lease: Lease) -> None:
    lease.release("done" if lease.head.state == "done" else "released")


def _collected(work: Work, lease: Lease, dropped: tuple[Entry, ...], grace: float) -> list[str]:
    store, clock = work.store, work.clock
    manifests = Manifests(store)
    committer = Committer(store, lease, manifests, RETAINED)
    collector = Collector(store, lease, manifests, committer, clock, grace)
    collector.dropped(dropped)
    try:
        left = orphans(store, set(keys_of(manifests, lease.head.needed)))
    except DataError as error:
        raise DataError(
            f"gc: {error}, so nobody knows what it needs; remedy: bring it back, or take that checkpoint "
            f"out: runner checkpoints rm {store.place} --id ID"
        ) from error
    if not (left.manifests or left.blobs):
        return []
    objects = f"{left} that {HEAD} does not name"
    if grace:
        work.say(
            f"{objects}: deleted in {grace / 60:.0f} min, because somebody may have begun to read them; "
            "--no-grace deletes them now. Ctrl-C gives the run back and deletes nothing"
        )
    else:
        work.say(f"{objects}: deleted now")
    collector.look()  # a pin that is the same after the grace is of a reader that has died
    until = clock.now() + grace
    while (wait := until - clock.now()) > 0:
        clock.sleep(min(RENEW_EVERY, wait))
        lease.renew()
    return collector.collect()
