"""Runs in a store, for tests of what reads and maintains them: a supervisor without a trainer."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from runner.checkpoint.collect import Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import publish, seal
from runner.checkpoint.head import HEAD, Blob, Entry, Head, Manifest, Owner, blob_key, encode, manifest_key
from runner.checkpoint.lease import Lease, found
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.store import Patience, Store


class Clock:
    """Time that passes when somebody waits; `each` is called then."""

    def __init__(self) -> None:
        self.time = 0.0
        self.each: Callable[[], object] = lambda: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.each()


class Run:
    """A supervisor that owns a run."""

    def __init__(
        self,
        store: Store,
        path: Path,
        clock: Clock,
        name: str = "a",
        keep_last: int = 2,
        *,
        on_event: Callable[[Mapping[str, Any]], object] = lambda event: None,
        job: str | None = None,
        lock: str | None = None,
    ) -> None:
        self.store = store
        self.path = path / f"{name}-{uuid.uuid4().hex}"
        self.path.mkdir()
        patience = Patience(300, clock, on_event)
        owner = Owner(attempt=name, host=f"host-{name}", job=job, lock=lock)
        kept = {"geometry": {"per_device": 4}}
        self.lease = Lease(store, owner, clock, patience, along=lambda: kept)
        self.manifests = Manifests(store)
        self.committer = Committer(store, self.lease, self.manifests, keep_last)
        self.collector = Collector(store, self.lease, self.manifests, self.committer, clock)
        self.parent: str | None = None

    def taken(self) -> Self:
        assert self.lease.take()
        return self

    def commit(self, step: int, **files: bytes) -> Entry:
        """Commit a checkpoint: `state` differs from step to step, `config.json` does not."""
        name = f"{step:08d}-{self.lease.head.epoch:04d}"
        folder = self.path / "saving"
        folder.mkdir()
        for file, content in {"state": f"state at {step}".encode(), "config.json": b"{}", **files}.items():
            (folder / file).write_bytes(content)
        sealed = seal(folder, id=name, step=step, parent=self.parent, extra={})
        outbox = self.path / "outbox"
        outbox.mkdir(exist_ok=True)
        moved = type(sealed)(**{**vars(sealed), "folder": publish(sealed.folder, outbox, name)})
        entry, dropped = self.committer.commit(moved)
        self.collector.dropped(dropped)
        self.parent = name
        return entry

    def finish(self, step: int, files: dict[str, bytes], extra: dict[str, Any] | None = None) -> Entry:
        """What a done run ends with; the state is `done` then."""
        epoch = self.lease.head.epoch
        blobs = {}
        for name, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            key = blob_key(epoch, digest, 0)
            assert self.store.create(key, content)
            blobs[name] = Blob(key=key, size=len(content), sha256=digest)
        id = "final"
        manifest = Manifest(id=id, step=step, epoch=epoch, parent=self.parent, files=blobs, extra=extra or {})
        key = manifest_key(step, epoch, id)
        assert self.store.create(key, encode(manifest))
        entry = self.manifests.keep(key, manifest)
        self.lease.write(lambda head: {"state": "done", "final": entry})
        return entry

    def blobs(self, entry: Entry) -> dict[str, str]:
        """Keys by file."""
        return {name: blob.key for name, blob in self.manifests.get(entry).files.items()}


def head(store: Store) -> Head:
    held = found(store)
    assert held is not None
    return held[0]


def overwrite(store: Store, key: str, data: bytes) -> None:
    """As no store of ours does: damage."""
    store.delete(key)
    assert store.swap(key, data, None) if key == HEAD else store.create(key, data)


def content(store: Store, key: str) -> bytes:
    held = store.read(key)
    assert held is not None
    return held.data
