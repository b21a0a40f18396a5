"""A new `HEAD` for a run whose own is missing or damaged, from the manifests that are left.

    verify the named checkpoint, then each older one -> an epoch above every one in a key -> swap

What was committed cannot be told from what was only sent: `HEAD` alone knew. So a person names the
checkpoint, and older ones count when every byte is there. What else `HEAD` held (geometry, costs, the end) is
gone with it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator

from runner.checkpoint.head import (
    BLOBS,
    EVENTS,
    FINAL,
    HEAD,
    MANIFESTS,
    RETAINED,
    TTL,
    Entry,
    Head,
    Manifest,
    Owner,
    decode,
    encode,
    is_manifest,
    manifest_key,
    step_of,
)
from runner.checkpoint.lease import Lease
from runner.checkpoint.restore import download
from runner.checkpoint.store import Patience, Store
from runner.durable import scratch
from runner.errors import DataError, NotOwner, UsageError


def adopt(
    store: Store,
    key: str,
    lease: Lease,
    owner: Owner,
    patience: Patience,
    replace: bool,
    say: Callable[[str], object],
) -> Head:
    """Make a checkpoint the head of its run, which is released then. Returns the new `HEAD`.

    Args:
        key: of the manifest.
        lease: not taken yet; used when there is a `HEAD` to replace.
        replace: also where `HEAD` can be read.

    Raises:
        UsageError: `HEAD` can be read, and shall not be replaced.
        NotOwner: somebody works on the run.
        DataError: the checkpoint is not whole, or is none.
        JobError: `HEAD` is of a newer format.
    """
    readable, etag = readable_head(store)
    if readable is not None and not replace:
        if readable.state == "held":
            raise NotOwner(
                f"adopt: {store.place}: {readable.owner.attempt} on {readable.owner.host} owns the run, and "
                f"{HEAD} is whole; remedy: stop it, then --replace"
            )
        raise UsageError(
            f"adopt: {store.place}: {HEAD} is whole and the run {readable.state}: nothing has to be adopted\n"
            "    remedy: --replace takes the run back to this checkpoint all the same"
        )
    newest = _verified(store, key)
    say(f"{newest.id}: step {newest.step}, whole")
    retained = (newest, *_older(store, newest, say))
    if readable is not None:
        lease.take(("done", "removing"))
        above = max(lease.head.epoch, epoch_above(store))
        return lease.write(
            lambda head: {"state": "released", "epoch": above, "retained": retained, "final": None}
        )
    head = Head(
        state="released",
        epoch=epoch_above(store),
        owner=owner,
        seq=1,
        nonce=uuid.uuid4().hex,
        ttl_s=TTL,
        retained=retained,
    )
    put(store, head, etag, patience)
    return head


def readable_head(store: Store) -> tuple[Head | None, str | None]:
    """`HEAD`, None if it is missing or damaged; and its etag, None if it is missing.

    Raises:
        JobError: of a newer format.
    """
    held = store.read(HEAD)
    if held is None:
        return None, None
    try:
        return decode(Head, held.data, HEAD), held.etag
    except DataError:
        return None, held.etag


def put(store: Store, head: Head, etag: str | None, patience: Patience) -> None:
    """Write a `HEAD` where there was none that could be read.

    Raises:
        NotOwner: somebody else wrote one meanwhile.
    """
    data = encode(head)

    def swap() -> None:
        if store.swap(HEAD, data, etag) is None:
            held = store.read(HEAD)
            if held is None or held.data != data:  # or an earlier try of ours, whose answer was lost
                raise NotOwner(
                    f"{store.place}: somebody else wrote {HEAD} meanwhile; remedy: see what it says: runner "
                    f"checkpoints ls {store.place}"
                )

    patience.run(swap)


def epoch_above(store: Store) -> int:
    """One more than any epoch that stands in a key: whoever wrote there before is fenced."""
    found = [0]
    for prefix in (MANIFESTS, BLOBS, EVENTS):
        for key in store.keys(prefix):
            parts = key.removeprefix(prefix).replace("/", "-").split("-")
            number = parts[1] if prefix == MANIFESTS and len(parts) > 1 else parts[0]
            if number.isdecimal():
                found.append(int(number))
    return max(found) + 1


def _older(store: Store, newest: Entry, say: Callable[[str], object]) -> Iterator[Entry]:
    """Whole checkpoints of smaller steps, newest first, one for each step."""
    seen = {newest.step}
    for key in sorted(filter(is_manifest, store.keys(MANIFESTS)), reverse=True):
        step = step_of(key)
        if step >= newest.step or step in seen:
            continue
        if len(seen) == RETAINED:
            return
        try:
            entry = _verified(store, key)
        except DataError as error:
            say(f"left out: {error}")
            continue
        seen.add(step)
        say(f"{entry.id}: step {step}, whole")
        yield entry


def _verified(store: Store, key: str) -> Entry:
    """A checkpoint after every byte of it was read.

    Raises:
        DataError: it is not whole, or the key is not that of a checkpoint.
    """
    place = f"{store.place}/{key}"
    held = store.read(key)
    if held is None:
        raise DataError(f"adopt: {place}: no such manifest; remedy: name one that is there")
    manifest = decode(Manifest, held.data, place)
    if manifest_key(manifest.step, manifest.epoch, manifest.id) != key:
        raise DataError(f"adopt: {place}: it says that it is {manifest.id} of step {manifest.step}")
    if manifest.id == FINAL:
        raise DataError(f"adopt: {place}: the end of a run, not a checkpoint to go on from")
    with scratch("adopt a checkpoint") as folder:
        download(store, manifest, folder)
    digest = hashlib.sha256(held.data).hexdigest()
    return Entry(id=manifest.id, step=manifest.step, key=key, manifest_sha256=digest)
