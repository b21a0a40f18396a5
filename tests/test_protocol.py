"""The checkpoint protocol as a library: who may own a run, what is committed, restored and collected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint import commit
from runner.checkpoint.collect import GRACE, garbage
from runner.checkpoint.head import (
    HEAD,
    TTL,
    Entry,
    Head,
    Manifest,
    Owner,
    Pin,
    blob_key,
    committed,
    decode,
    encode,
    epoch_of,
    manifest_key,
)
from runner.checkpoint.lease import Claim, Fate, claim, fate
from runner.checkpoint.memory import MemoryStore
from runner.checkpoint.restore import restore
from runner.checkpoint.store import Object, Store, Transient
from runner.errors import DataError, JobError, NotOwner, Preempted, StorageError
from tests.runs_in_store import Clock, Run


class Unanswered(MemoryStore):
    """Swaps are lost or late, as the test says: a list of `before`, `after` and `late`, used up in order."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: list[str] = []
        self.late: list[Callable[[], object]] = []
        self.requests = 0

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        how = self.plan.pop(0) if self.plan else ""
        if how == "late":
            self.late.append(lambda: MemoryStore.swap(self, key, data, etag))
        elif how != "before":
            done = super().swap(key, data, etag)
            if not how:
                return done
        raise Transient(StorageError(f"no answer, {how}"))

    def create(self, key: str, data: bytes) -> bool:
        self.requests += 1
        return super().create(key, data)

    def fetch(self, key: str, path: Path, size: int) -> str:
        self.requests += 1
        return super().fetch(key, path, size)

    def read(self, key: str) -> Object | None:
        self.requests += 1
        return super().read(key)


class Process(Run):
    """A supervisor with a clock of its own, and what it said."""

    def __init__(
        self, store: Store, path: Path, name: str, job: str | None = None, lock: str | None = None
    ) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.clock = Clock()
        super().__init__(store, path, self.clock, name, on_event=self.events.append, job=job, lock=lock)

    def restored(self) -> tuple[int, str]:
        """Step and state of what a restore gives."""
        found = restore(self.store, self.lease, self.manifests, self.path / "restored", self.events.append)
        assert found is not None
        sealed, manifest = found
        self.committer.trust(manifest)
        self.parent = sealed.id
        return sealed.step, (sealed.folder / "state").read_text()


@pytest.fixture
def store() -> Unanswered:
    return Unanswered()


@pytest.fixture
def a(store: Unanswered, tmp_path: Path) -> Process:
    return Process(store, tmp_path, "a").taken()


def head_in(store: MemoryStore) -> Head:
    return decode(Head, store.objects[HEAD].data, HEAD)


# --- rules ---


def head(state: str = "held", epoch: int = 3, nonce: str = "n", lock: str | None = "boot:1") -> Head:
    owner = Owner(attempt="x", host="y", lock=lock)
    return Head.model_validate(
        {"state": state, "epoch": epoch, "owner": owner, "seq": 9, "nonce": nonce, "ttl_s": 60}
    )


@pytest.mark.parametrize(
    ("found", "renewed", "unchanged", "lock", "expected"),
    [
        (None, False, 0, None, Claim.CREATE),
        (head("done"), True, 0, "boot:1", Claim.DONE),
        (head("released"), True, 0, None, Claim.TAKE),
        (head(), True, 0, "boot:1", Claim.TAKE),
        (head(lock=None), True, 0, None, Claim.LEAVE),
        (head(), True, 99, "boot:2", Claim.LEAVE),
        (head(), False, 60, "boot:2", Claim.TAKE),
        (head(), False, 59, None, Claim.WAIT),
    ],
)
def test_claim(
    found: Head | None, renewed: bool, unchanged: float, lock: str | None, expected: Claim
) -> None:
    assert claim(found, renewed, unchanged, lock) is expected


@pytest.mark.parametrize(
    ("found", "same", "expected"),
    [
        (head(nonce="mine"), False, Fate.WON),
        (head(nonce="mine"), True, Fate.WON),
        (head(epoch=2, nonce="old"), True, Fate.NOTHING),
        (head(nonce="old"), True, Fate.NOTHING),
        (head(epoch=4, nonce="other"), False, Fate.FENCED),
        (head(nonce="other"), False, Fate.FENCED),
    ],
)
def test_fate(found: Head, same: bool, expected: Fate) -> None:
    assert fate(found, same, {"mine"}) is expected


def test_garbage() -> None:
    keys = [blob_key(1, "a", 0), blob_key(2, "b", 1), blob_key(3, "c", 0)]
    assert garbage(keys, {keys[0]}, 2) == [keys[1]]
    manifests = [manifest_key(8, 2, "00000008-0002"), manifest_key(8, 3, "00000008-0003")]
    assert garbage(manifests, (), 2) == manifests[:1]
    assert [epoch_of(key) for key in (*keys, *manifests)] == [1, 2, 3, 2, 3]


def test_retained_is_capped() -> None:
    entries = [Entry(id=f"{n}", step=n, key=f"{n}", manifest_sha256="") for n in range(100)]
    assert len(committed(entries, entries[0], 1000)) == 64
    assert committed(entries[1:4], entries[0], 2) == tuple(entries[:2])


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (lambda text: text[:-9], DataError, "cannot be read as a head"),
        (lambda text: text.replace('"seq": 9', '"seq": 8'), DataError, "checksum"),
        (lambda text: text.replace('"format": 1', '"format": 2'), JobError, "format 2"),
        (lambda text: "[]", DataError, "format"),
    ],
)
def test_damaged_head_is_said(harm: Callable[[str], str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        decode(Head, harm(encode(head()).decode()).encode(), HEAD)


def test_head_of_a_later_version_keeps_its_checksum() -> None:
    body = {**json.loads(encode(head())), "later": [1]}
    del body["sha256"], body["format"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert decode(Head, json.dumps({"format": 1, **body, "sha256": digest}).encode(), HEAD) == head()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "."])
def test_manifest_cannot_write_outside_its_folder(name: str) -> None:
    files = {name: {"key": "k", "size": 1, "sha256": "s"}}
    body = {"id": "x", "step": 1, "epoch": 1, "parent": None, "files": files}
    with pytest.raises(ValueError, match="outside the checkpoint"):
        Manifest.model_validate(body)


# --- the lease ---


def test_fresh_run_begins_with_head(a: Process, store: Unanswered) -> None:
    assert list(store.objects) == [HEAD]
    assert (head_in(store).epoch, head_in(store).state) == (1, "held")


def test_manifests_without_head_are_65(store: Unanswered, tmp_path: Path) -> None:
    store.create(manifest_key(2, 1, "x"), b"")
    with pytest.raises(DataError, match="runner checkpoints adopt memory/checkpoints/00000002-000001-x"):
        Process(store, tmp_path, "a").lease.take()


def test_damaged_head_is_65_and_stays(a: Process, store: Unanswered, tmp_path: Path) -> None:
    store.objects[HEAD] = Object(b"{", "x")
    with pytest.raises(DataError, match=r"format.*remedy|cannot be read.*remedy"):
        Process(store, tmp_path, "b").lease.take()
    assert store.objects[HEAD].data == b"{"


def test_released_run_is_taken_at_once_and_a_done_one_never(
    a: Process, store: Unanswered, tmp_path: Path
) -> None:
    a.lease.release()
    b = Process(store, tmp_path, "b").taken()
    assert (b.clock.now(), b.lease.head.epoch) == (0, 2)
    b.lease.release("done")
    assert not Process(store, tmp_path, "c").lease.take()
    assert head_in(store).epoch == 2


def test_silent_owner_is_replaced_after_its_ttl_and_is_fenced(
    a: Process, store: Unanswered, tmp_path: Path
) -> None:
    b = Process(store, tmp_path, "b").taken()
    assert TTL <= b.clock.now() <= TTL + 10
    before = dict(store.objects)
    with pytest.raises(NotOwner, match="epoch 2 belongs to b on host-b"):
        a.lease.renew()
    assert store.objects == before


def test_waiter_leaves_when_the_owner_renews(a: Process, store: Unanswered, tmp_path: Path) -> None:
    b, c = Process(store, tmp_path, "b"), Process(store, tmp_path, "c", job="uid")
    b.clock.each = a.lease.renew
    with pytest.raises(NotOwner, match="epoch 1 belongs to a on host-a"):
        b.lease.take()
    assert b.clock.now() < TTL
    owner = Process(store, tmp_path, "d", job="uid").taken()
    c.clock.each = owner.lease.renew
    with pytest.raises(Preempted, match="of the same job uid"):
        c.lease.take()


def test_holder_of_the_dead_owners_lock_does_not_wait(store: Unanswered, tmp_path: Path) -> None:
    Process(store, tmp_path, "a", lock="boot:7").taken()
    assert Process(store, tmp_path, "b", lock="boot:7").taken().clock.now() == 0
    assert Process(store, tmp_path, "c", lock="other:7").taken().clock.now() >= TTL


@pytest.mark.parametrize("plan", [["before"], ["after"], ["before", "after"], ["late"], ["before"] * 4])
def test_lost_answers_change_nothing(a: Process, store: Unanswered, plan: list[str]) -> None:
    store.plan = list(plan)
    entry = a.commit(2)
    assert head_in(store).retained == (entry,)
    for late in store.late:
        late()
    assert a.commit(4).step == 4
    assert [one.step for one in head_in(store).retained] == [4, 2]


def test_swap_that_arrives_late_is_known_as_ones_own(a: Process, store: Unanswered) -> None:
    """A renewal gave up on a silent store; it arrives just before the commit that follows."""
    store.plan = ["late"] * 99
    with pytest.raises(StorageError, match="no answer"):
        a.lease.renew()
    store.plan = []
    store.late[0]()
    assert a.commit(2) == head_in(store).newest
    assert head_in(store).seq == 3


def test_slower_of_two_waiters_leaves(a: Process, store: Unanswered, tmp_path: Path) -> None:
    b, c = Process(store, tmp_path, "b"), Process(store, tmp_path, "c")
    b.clock.each = lambda: c.lease.take() if b.clock.now() == TTL else None
    with pytest.raises(NotOwner, match="epoch 2 belongs to c"):
        b.lease.take()
    assert c.lease.head == head_in(store)


def test_take_over_survives_lost_answers(a: Process, store: Unanswered, tmp_path: Path) -> None:
    store.plan = ["after"]
    assert Process(store, tmp_path, "b").taken().lease.head == head_in(store)
    assert head_in(store).epoch == 2


def test_vanished_head_is_65(a: Process, store: Unanswered) -> None:
    del store.objects[HEAD]
    with pytest.raises(DataError, match="has vanished"):
        a.lease.renew()


# --- commit and restore ---


def test_restore_on_another_machine_gives_what_was_committed(
    a: Process, store: Unanswered, tmp_path: Path
) -> None:
    for step in (2, 4, 6):
        a.commit(step)
    assert head_in(store).geometry == {"per_device": 4}
    a.lease.release()
    b = Process(store, tmp_path, "b").taken()
    assert b.restored() == (6, "state at 6")
    fetched = store.requests
    assert b.restored() == (6, "state at 6")
    assert store.requests == fetched  # it is there already


def test_unchanged_large_file_is_sent_once(
    a: Process, store: Unanswered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "SHARED_FROM", len(b"{}"))
    config = hashlib.sha256(b"{}").hexdigest()
    for step in (2, 4):
        a.commit(step)
    a.lease.release()
    b = Process(store, tmp_path, "b").taken()
    b.restored()
    b.commit(6)
    assert [key for key in store.objects if config in key] == [blob_key(1, config, 0)]


def test_no_two_checkpoints_share_a_small_file(a: Process, store: Unanswered, tmp_path: Path) -> None:
    config = hashlib.sha256(b"{}").hexdigest()
    for step in (2, 4):
        a.commit(step)
    a.lease.release()
    b = Process(store, tmp_path, "b").taken()
    b.restored()
    b.commit(6)
    keys = [blob_key(1, config, 0), blob_key(1, config, 1), blob_key(2, config, 0)]
    assert [key for key in store.objects if config in key] == keys


def test_run_without_checkpoints_restores_none(a: Process) -> None:
    assert restore(a.store, a.lease, a.manifests, a.path / "restored", a.events.append) is None


Harm = Callable[[MemoryStore, str], object]


def flip(store: MemoryStore, key: str) -> None:
    data = store.objects[key].data
    store.objects[key] = Object(data[:-1] + bytes([data[-1] ^ 1]), "x")


def truncate(store: MemoryStore, key: str) -> None:
    store.objects[key] = Object(store.objects[key].data[:-1], "x")


@pytest.mark.parametrize("harm", [flip, truncate, lambda store, key: store.delete(key)])
def test_any_damaged_object_costs_the_way_to_the_one_before(
    store: Unanswered, tmp_path: Path, harm: Harm
) -> None:
    a = Process(store, tmp_path, "a").taken()
    old, new = a.commit(2), a.commit(4)
    needed = a.manifests.get(new).files
    kept = dict(store.objects)
    for number, key in enumerate([new.key, *{blob.key for blob in needed.values()}]):
        store.objects = dict(kept)
        harm(store, key)
        b = Process(store, tmp_path, f"b{number}").taken()
        assert b.restored() == (2, "state at 2")
        assert "Going back to checkpoint 00000002-0001, step 2" in b.events[-1]["message"]
        assert (head_in(store).bad, head_in(store).retained) == ((new.key,), (old,))
        # The replay makes the same bytes again, and does not rely on what is damaged.
        b.commit(4)
        assert Process(store, tmp_path, f"c{number}").taken().restored() == (4, "state at 4")


def test_no_whole_checkpoint_is_65_and_nothing_is_forgotten(
    a: Process, store: Unanswered, tmp_path: Path
) -> None:
    entries = [a.commit(2), a.commit(4)]
    kept = dict(store.objects)
    for entry in entries:
        flip(store, entry.key)
    b = Process(store, tmp_path, "b").taken()
    with pytest.raises(DataError, match="no checkpoint in memory is whole"):
        b.restored()
    assert len(head_in(store).retained) == 2
    store.objects = {**store.objects, **{entry.key: kept[entry.key] for entry in entries}}
    assert b.restored() == (4, "state at 4")


def test_damage_on_the_way_is_fetched_once_more(
    a: Process, store: Unanswered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.commit(2)
    fetch, met = MemoryStore.fetch, []

    def damaged(self: MemoryStore, key: str, path: Path, size: int) -> str:
        sha256 = fetch(self, key, path, size)
        if key in met:
            return sha256
        met.append(key)
        path.write_bytes(b"~" * size)
        return hashlib.sha256(b"~" * size).hexdigest()

    monkeypatch.setattr(MemoryStore, "fetch", damaged)
    assert Process(store, tmp_path, "b").taken().restored() == (2, "state at 2")
    assert len(met) == 3


def test_key_that_holds_something_else_is_passed_over(a: Process, store: Unanswered, tmp_path: Path) -> None:
    """A server that stored the first try wrong, and said so to nobody."""
    spoilt = blob_key(1, hashlib.sha256(b"state at 2").hexdigest(), 0)
    store.objects[spoilt] = Object(b"state at 3", "x")
    a.commit(2)
    assert f"{spoilt}-1" in store.objects
    assert Process(store, tmp_path, "b").taken().restored() == (2, "state at 2")


def test_requests_do_not_grow_with_the_run(a: Process, store: Unanswered, tmp_path: Path) -> None:
    def cost(act: Callable[[], object]) -> int:
        before = store.requests
        act()
        return store.requests - before

    a.commit(1)
    a.commit(2)
    first = cost(lambda: a.commit(3))
    for step in range(4, 200):
        a.commit(step)
    assert cost(lambda: a.commit(200)) == first
    b = Process(store, tmp_path, "b").taken()
    assert cost(b.restored) == 4


# --- collection ---


def test_dropped_checkpoint_is_deleted_after_the_grace(a: Process, store: Unanswered) -> None:
    first = a.commit(2)
    for step in (4, 6):
        a.commit(step)
    assert a.collector.collect() == []
    a.clock.time += GRACE - 1
    a.lease.renew()
    assert a.collector.collect() == []
    a.clock.time += 1
    state = blob_key(1, hashlib.sha256(b"state at 2").hexdigest(), 0)
    deleted = a.collector.collect()
    assert {first.key, state} <= set(deleted)
    assert not {first.key, state} & set(store.objects)
    assert a.collector.collect() == []
    assert len(store.objects) == 1 + 2 + 2 * 3  # HEAD, manifests, of each state, checkpoint.json and config


def test_pinned_checkpoint_stays_until_its_pin_ends(a: Process, store: Unanswered) -> None:
    first = a.commit(2)
    for step in (4, 6):
        a.commit(step)
    store.create("pins/reader.json", encode(Pin(entry=first, ttl_s=100)))
    store.create("pins/noise.json", b"?")
    a.clock.time += GRACE
    a.collector.collect()
    assert {blob.key for blob in a.manifests.get(first).files.values()} <= set(store.objects)
    a.clock.time += 99
    assert a.collector.collect() == []
    a.clock.time += 1
    assert first.key in a.collector.collect()


def test_what_killed_owners_left_is_swept_once(a: Process, store: Unanswered, tmp_path: Path) -> None:
    a.commit(2)
    orphans = [blob_key(1, "0" * 64, 0), manifest_key(8, 1, "orphan")]
    for key in (*orphans, blob_key(2, "1" * 64, 0), blob_key(3, "2" * 64, 0)):
        store.create(key, b"")
    b = Process(store, tmp_path, "b").taken()
    assert b.collector.collect() == []
    b.clock.time += GRACE
    assert set(b.collector.collect()) == {*orphans, blob_key(2, "1" * 64, 0)}
    assert blob_key(3, "2" * 64, 0) in store.objects


def test_fenced_collector_deletes_nothing(a: Process, store: Unanswered, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        a.commit(step)
    Process(store, tmp_path, "b").taken()
    before = dict(store.objects)
    a.clock.time += GRACE
    with pytest.raises(NotOwner):
        a.collector.collect()
    assert store.objects == before


def test_unreadable_manifest_stops_the_collection(a: Process, store: Unanswered, tmp_path: Path) -> None:
    entries = [a.commit(step) for step in (2, 4)]
    flip(store, entries[0].key)
    b = Process(store, tmp_path, "b").taken()
    b.clock.time += GRACE
    before = dict(store.objects)
    with pytest.raises(DataError, match="not the manifest that was committed"):
        b.collector.collect()
    assert store.objects.keys() == before.keys()


def test_content_that_was_deleted_comes_back_under_another_key(a: Process, store: Unanswered) -> None:
    a.commit(2, state=b"again")
    for step in (4, 6):
        a.commit(step)
    a.clock.time += GRACE
    a.collector.collect()
    a.commit(8, state=b"again")
    key = blob_key(1, hashlib.sha256(b"again").hexdigest(), 0)
    assert key not in store.objects
    assert f"{key}-1" in store.objects
    assert a.restored() == (8, "again")
