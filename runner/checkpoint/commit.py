"""From a published folder to a committed checkpoint: blobs, then the manifest, then the swap of `HEAD`.

Nothing that was sent counts before the swap is confirmed, and a kill anywhere leaves objects that nobody
names. A large file is not sent twice by one process. It never relies on what another process has sent, but
for the files of the checkpoint that it restored and verified itself: those stay, because they are retained.

A small file is sent with every checkpoint, under a key of its own: where all checkpoints share an object, its
loss is the loss of all. (A rule of a bucket that deletes what is old would begin with just that one.)
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from runner.checkpoint.files import MANIFEST, FileRecord, Sealed, file_sha256
from runner.checkpoint.head import Blob, Entry, Manifest, blob_key, committed, encode, manifest_key
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.store import Store
from runner.durable import disk
from runner.errors import StorageError

FILES_AT_ONCE = 4

SHARED_FROM = 1 << 20
"""Bytes from which an unchanged file is worth an object that several checkpoints share."""

_COPIES = 8
"""Keys that are tried for one content, should the store hold something else under the first."""


class Committer:
    """Sends the checkpoints of one owner, one after another.

    Args:
        keep_last: checkpoints that stay retained.
    """

    def __init__(self, store: Store, lease: Lease, manifests: Manifests, keep_last: int) -> None:
        self._store = store
        self._lease = lease
        self._manifests = manifests
        self._keep_last = keep_last
        self._known: dict[str, str] = {}
        """Keys of the large contents that this process wrote or verified, by SHA-256."""
        self._own: dict[str, str] = {}
        """Keys of the small contents of the checkpoint under way: its commit may be tried again."""
        self._under_way: str | None = None
        """Its id."""
        self._sent_copies: Counter[str] = Counter()
        """Keys that this process wrote for a content."""
        self._spent: set[str] = set()
        """Keys that were deleted; a DELETE may arrive late, so they are never written again."""
        self._bad: tuple[str, ...] | None = None
        """What was bad at the last commit."""

    def trust(self, manifest: Manifest) -> None:
        """Rely on the blobs of a checkpoint that has just been verified."""
        large = [blob for blob in manifest.files.values() if blob.size >= SHARED_FROM]
        self._known.update((blob.sha256, blob.key) for blob in large)

    def forget(self, key: str) -> None:
        """Never rely on a blob again, nor write its key: it is about to be deleted."""
        self._spent.add(key)
        self._known = {sha256: known for sha256, known in self._known.items() if known != key}

    def commit(self, sealed: Sealed) -> tuple[Entry, tuple[Entry, ...]]:
        """Commit a sealed folder that nobody changes any more.

        Returns:
            The new head, and what is not retained any more.

        Raises:
            NotOwner, Preempted: another process owns the run.
            StorageError, AccessDenied: the store, or the folder. The same call may be made again.
        """
        entry = self._written(sealed)
        before = self._lease.head.retained
        after = self._lease.write(lambda head: {"retained": committed(head.retained, entry, self._keep_last)})
        return entry, tuple(old for old in before if old not in after.retained)

    def finish(self, sealed: Sealed) -> Entry:
        """Commit what the run ends with, and that it is done, by one swap.

        Raises:
            As `commit` does.
        """
        entry = self._written(sealed)
        self._lease.write(lambda head: {"state": "done", "final": entry})
        return entry

    def _written(self, sealed: Sealed) -> Entry:
        """Send a folder and write its manifest; nobody counts it yet."""
        bad = self._lease.head.bad
        if self._bad not in (None, bad):
            # A checkpoint of this very process has rotted in the store, and it may share files with others.
            self._spent.update(self._known.values())
            self._known.clear()
        self._bad = bad
        if self._under_way != sealed.id:
            self._under_way, self._own = sealed.id, {}
        local = sealed.folder / MANIFEST
        with disk(f"send checkpoint {sealed.id}", sealed.folder):
            records = {
                **sealed.files,
                MANIFEST: FileRecord(size=local.stat().st_size, sha256=file_sha256(local)),
            }
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                blobs = dict(pool.map(lambda item: self._send(sealed, *item), sorted(records.items())))
        epoch = self._lease.head.epoch
        manifest = Manifest(
            id=sealed.id,
            step=sealed.step,
            epoch=epoch,
            parent=sealed.parent,
            files=blobs,
            extra=dict(sealed.extra),
        )
        key = manifest_key(sealed.step, epoch, sealed.id)
        if not self._store.create(key, encode(manifest)):
            raise StorageError(
                f"commit checkpoint {sealed.id}: {self._store.place}/{key} exists with other content; "
                "remedy: give the same command again, which begins a new epoch"
            )
        return self._manifests.keep(key, manifest)

    def _send(self, sealed: Sealed, name: str, record: FileRecord) -> tuple[str, Blob]:
        keys = self._known if record.size >= SHARED_FROM else self._own
        key = keys.get(record.sha256)
        if key is None:
            key = keys[record.sha256] = self._sent(sealed, name, record)
        return name, Blob(key=key, size=record.size, sha256=record.sha256)

    def _sent(self, sealed: Sealed, name: str, record: FileRecord) -> str:
        path = sealed.folder / name
        first = self._sent_copies[record.sha256]
        for copy in range(first, first + _COPIES):
            key = blob_key(self._lease.head.epoch, record.sha256, copy)
            if key in self._spent:
                continue
            if self._store.create_file(key, path, record.size, record.sha256):
                self._sent_copies[record.sha256] = copy + 1
                return key
        raise StorageError(
            f"send checkpoint {sealed.id}: {self._store.place} does not hold what was sent for {path}; "
            "remedy: check what else writes there"
        )
