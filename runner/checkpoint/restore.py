"""From a committed checkpoint back to a folder: fetched, verified, fetched once more, or the one before.

Only what `HEAD` retains is restored, newest first, and only when every byte is what was committed. A
checkpoint that fails leaves `retained` for `bad` by the next swap; with none left the run stops, and never
starts over.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runner.checkpoint.files import MANIFEST, FileRecord, Sealed, read, verify
from runner.checkpoint.head import Blob, Manifest, without_bad
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import TRIES, Manifests
from runner.checkpoint.store import Missing, Store
from runner.durable import disk
from runner.errors import DataError

FILES_AT_ONCE = 4

Say = Callable[[Mapping[str, Any]], None]


def restore(
    store: Store,
    lease: Lease,
    manifests: Manifests,
    folder: Path,
    say: Say,
) -> tuple[Sealed, Manifest] | None:
    """The newest checkpoint that verifies, in `folder/<id>`. None for a run that has none yet.

    Args:
        folder: what is there already and verifies is not fetched again.

    Raises:
        DataError: there are checkpoints and none is whole; `HEAD` stays as it was.
        NotOwner, StorageError, AccessDenied: nothing was learnt about the checkpoints.
    """
    reasons: dict[str, str] = {}
    for entry in lease.head.retained:
        try:
            manifest = manifests.get(entry)
            sealed = download(store, manifest, folder, say)
        except DataError as error:
            reasons[entry.key] = str(error)
            say({"event": "bad", "id": entry.id, "reason": str(error)})
            continue
        if reasons:
            lease.write(lambda head: without_bad(head, tuple(reasons)))
            said = f"{'; '.join(reasons.values())}. Going back to checkpoint {entry.id}, step {entry.step}"
            say({"event": "warning", "message": said})
        return sealed, manifest
    if not reasons:
        return None
    raise DataError(
        f"restore: no checkpoint in {store.place} is whole: {'; '.join(reasons.values())}; remedy: bring "
        "back what was lost (versioned buckets keep it), or begin a new run under another name"
    )


def download(store: Store, manifest: Manifest, folder: Path, say: Say = lambda event: None) -> Sealed:
    """Fetch one checkpoint into `folder/<id>`, whole or not at all.

    Args:
        say: takes an event about a file that is fetched again; from any thread.

    Raises:
        DataError: an object is missing or not what was committed.
    """
    target, partial = folder / manifest.id, folder / f"{manifest.id}.partial"
    with disk(f"restore checkpoint {manifest.id}", folder):
        if target.is_dir():
            if (kept := _kept(target, manifest)) is not None:
                return kept
            shutil.rmtree(target)
        if partial.is_dir():
            shutil.rmtree(partial)
        fetch_files(store, manifest.id, manifest.files, partial, say)
        # Not synced: what a crash of this machine leaves does not verify, and is fetched again.
        partial.rename(target)
    return _listed(target, manifest)


def _listed(target: Path, manifest: Manifest) -> Sealed:
    """A folder whose files have been verified against the manifest of the store, by its own manifest.

    Raises:
        DataError: the two name other files.
    """
    sealed = read(target)
    told = {name: FileRecord(size=blob.size, sha256=blob.sha256) for name, blob in manifest.files.items()}
    told.pop(MANIFEST, None)
    if sealed.files != told:
        raise DataError(f"checkpoint {manifest.id}: its {MANIFEST} names other files than were committed")
    return sealed


def fetch_files(
    store: Store, id: str, files: Mapping[str, Blob], folder: Path, say: Say = lambda event: None
) -> None:
    """Fetch and verify some files of a checkpoint, by path inside a new folder.

    Raises:
        DataError: an object is missing or not what was committed.
    """
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        jobs = [
            pool.submit(fetch_file, store, id, blob, folder / name, say)
            for name, blob in sorted(files.items())
        ]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _kept(target: Path, manifest: Manifest) -> Sealed | None:
    """A local copy, if it is the checkpoint that was committed."""
    try:
        sealed = verify(target)
    except DataError:
        return None
    return sealed if sealed.manifest_sha256 == manifest.files[MANIFEST].sha256 else None


def fetch_file(store: Store, name: str, blob: Blob, path: Path, say: Say = lambda event: None) -> None:
    """Fetch one file, verify it, and fetch it once more if it is damaged.

    Args:
        name: of its checkpoint, for messages.

    Raises:
        Missing: it is not there.
        DataError: it is not what was committed.
    """
    reason = ""
    for _ in range(TRIES):
        if reason:
            said = f"checkpoint {name}: {path.name}: {reason}; fetching it again"
            say({"event": "store", "message": said, "waited": 0.0})
        try:
            digest = store.fetch(blob.key, path, blob.size)
        except Missing:
            raise
        except DataError as error:
            reason = str(error)
            continue
        if digest == blob.sha256:
            return
        reason = f"{store.place}/{blob.key} has SHA-256 {digest}, not {blob.sha256}"
    raise DataError(f"checkpoint {name}: {path.name}: {reason}")
