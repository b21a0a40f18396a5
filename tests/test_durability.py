"""A loss of power: at every operation of a checkpoint's life, all that was not synced is dropped.

What is left must obey the protocol: a name that shows has its whole content, `HEAD` names only what is there,
and nothing is lost that somebody was told is safe. Then each fsync of the runner is left out, one after the
other, and the same check has to find it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.collect import Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import MANIFEST, move, publish, seal, verify
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import Entry, Head, Manifest, Owner, decode
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.restore import restore
from runner.checkpoint.store import BootClock, Patience
from runner.durable import write_text
from runner.errors import DataError
from tests.unsynced import Recorder, Site, State

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")

NOT_NEEDED = {
    # What was moved may show in its old place as well: a leftover that is committed, or half an attempt.
    ("move", "sync(folder.parent)"),
    # What comes back is named by nothing, and is deleted again.
    ("FolderStore.delete", "sync(path.parent)"),
}
"""Calls of fsync that save work, and keep no promise."""

EXPECTED = {
    ("write_text", "os.fsync(file.fileno())"),
    ("write_text", "sync(path.parent)"),
    ("seal", "sync(path)"),
    ("sync_folders", "sync(Path(root))"),
    ("move", "sync(target.parent)"),
    ("FolderStore._link_new", "sync(spare)"),
    ("FolderStore._sync_up", "sync(path)"),
    ("FolderStore._sync_up", "sync(self._root.parent)"),
}
"""Calls of fsync that promises depend on."""


def live(run: Path, recorder: Recorder) -> None:
    """Two owners of one run in a folder store: save, publish, commit, collect, restore, write small files."""
    for folder in ("attempts/1", "outbox", "newest"):
        (run / folder).mkdir(parents=True)
    for folder in (run / "attempts", run):
        recorder.made(folder)
    write_text(run / "plan.json", "first")
    recorder.acknowledge(("text", "plan.json", "first"))
    clock = BootClock()
    number = 0
    for owner in ("a", "b"):
        store = FolderStore(run / "checkpoints")
        patience = Patience(1, clock, lambda event: None)
        lease = Lease(store, Owner(attempt=owner, host="here", lock="lock"), clock, patience)
        assert lease.take()
        recorder.acknowledge(("head", lease.head.seq))
        manifests = Manifests(store)
        committer = Committer(store, lease, manifests, keep_last=2)
        collector = Collector(store, lease, manifests, committer, clock, grace=0.0)
        if owner == "a":
            assert store.create("run.json", b"identity")
            recorder.acknowledge(("store", "run.json", b"identity"))
        restored = restore(store, lease, manifests, run / "newest", lambda event: None)
        if restored is not None:
            recorder.acknowledge(("restored", restored[0].id))
            committer.trust(restored[1])
        for _ in range(2):
            number += 1
            _commit(run, number, committer, collector, recorder)
        lease.release()
        recorder.acknowledge(("head", lease.head.seq))
        for kept in (run / "newest").iterdir():  # another machine, for the next owner
            kept.rename(run / "attempts" / f"old-{owner}-{kept.name}")
        recorder.made(run / "newest")
        recorder.made(run / "attempts")
    write_text(run / "plan.json", "second")
    recorder.acknowledge(("text", "plan.json", "second"))


def _commit(run: Path, number: int, committer: Committer, collector: Collector, recorder: Recorder) -> None:
    saving, name = run / "attempts" / "1" / f"saving-{number}", f"c{number}"
    (saving / "deep").mkdir(parents=True)
    (saving / "state.bin").write_bytes(f"state {number}".encode())
    (saving / "deep" / "frozen.bin").write_bytes(b"frozen")
    seal(saving, id=name, step=number, parent=None, extra={})
    folder = publish(saving, run / "outbox", name)
    recorder.acknowledge(("published", name))
    entry, dropped = committer.commit(verify(folder))
    recorder.acknowledge(("committed", entry))
    move(folder, run / "newest" / name)
    recorder.acknowledge(("kept", name))
    collector.dropped(dropped)
    collector.collect()


# --- what must hold of what is left ---


def wrong(state: State, promises: list[Any], texts: set[str]) -> Iterator[str]:
    """What is wrong with a disk after the loss.

    Args:
        promises: what was acknowledged before.
        texts: all that plan.json ever was.
    """
    store = {path.removeprefix("checkpoints/"): data for path, data in state.items() if _stored(path)}
    yield from _half(store)
    head = _head(store)
    if isinstance(head, Head):
        for entry in head.retained:
            yield from _missing(store, entry)
    elif head is not None:
        yield head
    whole = {}
    # What lies in newest/ is a copy for the process that made it; the next one removes it.
    for name in {path.split("/")[1] for path in state if path.startswith("outbox/")}:
        problem = _unsealed(state, f"outbox/{name}/")
        if problem is not None:
            yield f"outbox/{name}: {problem}"
        whole[name] = problem is None
    text = state.get("plan.json")
    if text is not None and text.decode() not in texts:
        yield f"plan.json is {text!r}"
    for promise in promises:
        yield from _broken(promise, state, store, head if isinstance(head, Head) else None, whole, promises)


def _broken(
    promise: Any, state: State, store: State, head: Head | None, whole: dict[str, bool], promises: list[Any]
) -> Iterator[str]:
    match promise:
        case ("text", path, _):
            last = [text for kind, *rest in promises if kind == "text" for text in rest[1:]][-1]
            found = state.get(path, b"").decode()
            if found not in (last, "second"):
                yield f"{path} is {found!r}, and {last!r} was written"
        case ("head", seq) if head is None or head.seq < seq:
            yield f"HEAD {seq} is lost: {head and head.seq}"
        case ("store", key, data) if store.get(key) != data:
            yield f"{key} is lost from the store"
        case ("committed", entry):
            newest = None if head is None else head.newest
            if newest is None or newest.step < entry.step:
                yield f"checkpoint {entry.id} was committed and is lost: {newest}"
        case ("published", name) if name == _last_published(promises) and not whole.get(name):
            yield f"checkpoint {name} was published and is lost"


def _last_published(promises: list[Any]) -> str | None:
    """Of a checkpoint that nothing has been done with since."""
    kind, *rest = promises[-1]
    return rest[0] if kind == "published" else None


def _stored(path: str) -> bool:
    return path.startswith("checkpoints/") and not path.startswith("checkpoints/.tmp/")


def _half(store: State) -> Iterator[str]:
    """Names in the store that show without their whole content."""
    for key, data in store.items():
        if key.startswith("blobs/") and _sha256(data) != key.rpartition("/")[2].partition("-")[0]:
            yield f"{key} shows {len(data)} bytes"
        if key.startswith("checkpoints/"):
            try:
                decode(Manifest, data, key)
            except DataError as error:
                yield str(error)
        if key == "run.json" and data != b"identity":
            yield f"run.json shows {data!r}"


def _head(store: State) -> Head | str | None:
    """The newest HEAD, or what is wrong with it."""
    versions = sorted(key for key in store if key.startswith("HEAD."))
    if not versions:
        return None
    try:
        return decode(Head, store[versions[-1]].partition(b"\n")[2], versions[-1])
    except DataError as error:
        return str(error)


def _missing(store: State, entry: Entry) -> Iterator[str]:
    """What HEAD names and is not there."""
    data = store.get(entry.key)
    if data is None or _sha256(data) != entry.manifest_sha256:
        yield f"HEAD names {entry.key}, which is {'missing' if data is None else 'another'}"
        return
    for name, blob in decode(Manifest, data, entry.key).files.items():
        if _sha256(store.get(blob.key, b"")) != blob.sha256:
            yield f"HEAD names {entry.id}, whose {name} is not there: {blob.key}"


def _unsealed(state: State, prefix: str) -> str | None:
    """Why a checkpoint folder is not whole."""
    files = {path.removeprefix(prefix): data for path, data in state.items() if path.startswith(prefix)}
    try:
        manifest = json.loads(files.pop(MANIFEST, b""))
    except ValueError:
        return f"no {MANIFEST}"
    recorded = {name: record["sha256"] for name, record in manifest["files"].items()}
    found = {name: _sha256(data) for name, data in files.items()}
    return None if found == recorded else f"has {sorted(found.items() ^ recorded.items())}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def violations(recorder: Recorder) -> list[str]:
    """All that is wrong at any moment, each once."""
    found: dict[str, None] = {}
    seen = set()
    for moment in recorder.moments:
        for state in moment.states():
            if (mark := (frozenset(state.items()), moment.acknowledged)) in seen:
                continue
            seen.add(mark)
            promises = recorder.acknowledgements[: moment.acknowledged]
            found.update(dict.fromkeys(wrong(state, promises, {"first", "second"})))
    return list(found)


def played(folder: Path, ignored: Site | None = None) -> Recorder:
    with Recorder(folder, ignored) as recorder:
        live(folder, recorder)
    return recorder


# --- the tests ---


def test_loss_of_power_loses_nothing_that_was_promised(tmp_path: Path) -> None:
    recorder = played(tmp_path)
    assert len(recorder.moments) > 300
    assert violations(recorder) == []


def test_check_finds_every_fsync_that_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    assert set(played(tmp_path / "all").sites) == EXPECTED | NOT_NEEDED
    found = set()
    for number, site in enumerate(EXPECTED | NOT_NEEDED):
        folder = tmp_path / str(number)
        folder.mkdir()
        if violations(played(folder, site)):
            found.add(site)
    assert found == EXPECTED
