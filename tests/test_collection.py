"""A long life of a run: what is deleted, what stays, and that neither cost nor rubbish grows with it.

One simulation over any store, with a clock of its own and drawn by a seed: owners commit, collect, are killed
between any two requests of a commit and replaced, sleep, and wake up when another owns the run; checkpoints
turn out bad; readers come with a pin or without, refresh it or die. Before every DELETE a guard looks at who
still needs that key. In the end exactly what `HEAD` names is left.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest

from runner.checkpoint import commit
from runner.checkpoint.collect import GRACE, Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import MANIFEST, FileRecord, Sealed
from runner.checkpoint.head import (
    BLOBS,
    HEAD,
    MANIFESTS,
    PINS,
    Blob,
    Entry,
    Head,
    Manifest,
    Owner,
    Pin,
    blob_key,
    decode,
    encode,
    manifest_key,
    without_bad,
)
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.memory import MemoryStore
from runner.checkpoint.restore import restore
from runner.checkpoint.s3 import S3Store, Settings
from runner.checkpoint.store import Object, Patience, Store
from runner.errors import NotOwner
from tests.fault_proxy import FaultProxy
from tests.runs_in_store import Clock
from tests.s3_server import BUCKET, ENVIRONMENT, s3_server

KEEP = 3

OTHERS = ("run.json", "events/000001-1.jsonl", "jobs/1.yaml")
"""Objects that are not the collector's."""


@pytest.fixture(autouse=True)
def every_unchanged_file_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are: what is deleted is hardest where checkpoints share objects."""
    monkeypatch.setattr(commit, "SHARED_FROM", 0)


class Killed(Exception):
    """The process has ended here."""


class Between:
    """A store that asks before it writes and before it deletes, and counts its calls."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.place = store.place
        self.calls = 0
        self.before: Callable[[str, str], None] = lambda verb, key: None

    def _asked(self, verb: str, key: str) -> Store:
        self.calls += 1
        self.before(verb, key)
        return self._store

    def create(self, key: str, data: bytes) -> bool:
        return self._asked("create", key).create(key, data)

    def create_file(self, key: str, path: Path, size: int, sha256: str) -> bool:
        return self._asked("create", key).create_file(key, path, size, sha256)

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        return self._asked("swap", key).swap(key, data, etag)

    def read(self, key: str) -> Object | None:
        return self._asked("read", key).read(key)

    def fetch(self, key: str, path: Path, size: int) -> str:
        return self._asked("read", key).fetch(key, path, size)

    def keys(self, prefix: str) -> Iterator[str]:
        return self._asked("list", prefix).keys(prefix)

    def delete(self, key: str) -> None:
        self._asked("delete", key).delete(key)

    def close(self) -> None:
        self._store.close()


class Process:
    """What one supervisor has in memory; it owns the run when this returns."""

    def __init__(self, store: Between, clock: Clock, name: str) -> None:
        patience = Patience(300, clock, lambda event: None)
        self.store = store
        self.lease = Lease(store, Owner(attempt=name, host=f"host-{name}"), clock, patience)
        self.manifests = Manifests(store)
        self.committer = Committer(store, self.lease, self.manifests, KEEP)
        assert self.lease.take()
        self.collector = Collector(store, self.lease, self.manifests, self.committer, clock)

    def commit(self, sealed: Sealed) -> Entry:
        entry, dropped = self.committer.commit(sealed)
        self.collector.dropped(dropped)
        return entry

    def trust_newest(self) -> None:
        """As after a restore."""
        if (newest := self.lease.head.newest) is not None:
            self.committer.trust(self.manifests.get(newest))


def saved(folder: Path, step: int, epoch: int) -> Sealed:
    """A checkpoint as a trainer leaves it, without the fsyncs that are not tested here.

    One file changes at every step, one at every 50th, one never.
    """
    folder.mkdir(exist_ok=True)
    name = f"{step:08d}-{epoch:04d}"
    contents = {"state": f"state {name}", "schedule": f"{step // 50}", "config.json": "{}"}
    files = {}
    for file, text in contents.items():
        replaced(folder / file, text)
        files[file] = FileRecord(size=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())
    told = {file: record.model_dump() for file, record in files.items()}
    document = {"format": 1, "id": name, "step": step, "parent": None, "files": told, "extra": {}}
    manifest = json.dumps(document)
    replaced(folder / MANIFEST, manifest)
    return Sealed(folder, name, step, None, {}, files, hashlib.sha256(manifest.encode()).hexdigest())


def replaced(path: Path, text: str) -> None:
    """A new file: to truncate an old one makes some file systems write it out."""
    path.unlink(missing_ok=True)
    path.write_text(text)


@dataclass
class Reader:
    """Somebody who restores a checkpoint for use elsewhere."""

    name: str
    entry: Entry
    needs: frozenset[str]
    """Keys that it has still to read."""
    until: float
    """When it may lose them: the end of its pin, or of the grace."""
    pin: str | None
    """The pin's etag."""

    @property
    def key(self) -> str:
        return f"pins/{self.name}.json"


class World:
    """A run, whoever works on it and whoever reads it."""

    def __init__(self, store: Store, folder: Path, seed: int) -> None:
        self.raw = store
        self.folder = folder
        self.clock = Clock()
        self.draw = random.Random(seed)
        self.owners = 0
        self.step = 0
        self.readers: list[Reader] = []
        self.zombies: list[Process] = []
        self.deleted = 0
        self.seen: dict[str, int] = {}
        self.manifests = Manifests(store)
        self.named_at: tuple[str, set[str]] = ("", set())
        for key in OTHERS:
            store.create(key, b"not the collector's")
        self.owner = self.next_owner()

    def guard(self, verb: str, key: str) -> None:
        """Before a request: is what it deletes needed by anybody?"""
        if verb != "delete":
            return
        self.deleted += 1
        assert key.startswith((BLOBS, MANIFESTS, PINS)), f"{key} is not the collector's"
        assert key not in self.named(), f"{key} is retained"
        for reader in self.readers:
            held = (*reader.needs, reader.key)
            assert self.clock.time >= reader.until or key not in held, f"{reader} loses {key}"

    def head(self) -> Head:
        found = self.raw.read(HEAD)
        assert found is not None
        return decode(Head, found.data, HEAD)

    def named(self) -> set[str]:
        """Keys of all that `HEAD` counts on."""
        found = self.raw.read(HEAD)
        assert found is not None
        if found.etag != self.named_at[0]:
            head = decode(Head, found.data, HEAD)
            finals = () if head.final is None else (head.final,)
            self.named_at = found.etag, self.needed({*head.retained, *finals}, self.manifests)
        return self.named_at[1]

    def needed(self, entries: Any, manifests: Manifests) -> set[str]:
        """Manifests and blobs of checkpoints."""
        keys = {entry.key for entry in entries}
        return keys | {blob.key for entry in entries for blob in manifests.get(entry).files.values()}

    def next_owner(self) -> Process:
        self.owners += 1
        store = Between(self.raw)
        store.before = self.guard
        owner = Process(store, self.clock, f"{self.owners}")
        owner.trust_newest()
        return owner

    def happened(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    # --- what happens ---

    def live(self, checkpoints: int, collect_every: int, trouble: float = 1) -> None:
        """Until so many checkpoints are committed; with `trouble` 1, something goes wrong at every 50th."""
        while self.step < checkpoints:
            self.clock.time += self.draw.uniform(10, 60)
            self.read()
            chance = self.draw.random() / trouble
            if chance < 0.01:
                self.replace_owner()
            elif chance < 0.015 and len(self.owner.lease.head.retained) == KEEP:
                self.turn_bad()
            elif chance < 0.02 and self.zombies:
                self.wake()
            elif chance < 0.023:
                self.nod_off()
            self.step += 1
            self.owner.commit(saved(self.folder, self.step, self.owner.lease.head.epoch))
            if self.step % collect_every == 0:
                self.owner.collector.collect()

    def replace_owner(self) -> None:
        """It is killed at some request of a commit, or sleeps, or leaves in peace; another takes over."""
        left = self.draw.randrange(5)
        if left == 4:
            self.owner.lease.release()
        elif self.draw.random() < 0.5:
            self.zombies.append(self.owner)
            self.happened("sleep")
        else:
            self.kill(left)
        self.owner = self.next_owner()
        self.happened("take-over")

    def kill(self, left: int) -> None:
        """End the owner in a commit that nobody hears of, after `left` more writes."""

        def stop(verb: str, key: str) -> None:
            nonlocal left
            if verb in ("create", "swap"):
                if left == 0:
                    raise Killed
                left -= 1

        self.owner.store.before = stop
        with pytest.raises(Killed):
            self.owner.commit(saved(self.folder, self.step + 1, self.owner.lease.head.epoch))
        self.happened("kill")

    def wake(self) -> None:
        """A fenced owner goes on where it slept: in the middle of a collection, or of a commit."""
        zombie = self.zombies.pop(self.draw.randrange(len(self.zombies)))
        own = zombie.lease.head.epoch
        for copy in range(3):  # what its last request was about to write
            self.raw.create(blob_key(own, hashlib.sha256(self.draw.randbytes(8)).hexdigest(), copy), b"late")
        zombie.collector.dropped(zombie.lease.head.retained)
        zombie.collector._sweep_at = 0.0
        with pytest.raises(NotOwner):
            zombie.collector.collect()
        with pytest.raises(NotOwner):
            zombie.commit(saved(self.folder, self.step + 1, own))
        self.happened("wake")

    def nod_off(self) -> None:
        """The owner falls asleep in a collection, and wakes up in it when another has gone on."""
        sleeper = self.owner
        sleeper.collector.collect()
        self.clock.time += GRACE
        sleeper.collector._sweep_at = self.clock.time

        def sleep(verb: str, key: str) -> None:
            if verb != "list" or key != MANIFESTS:
                return
            sleeper.store.before = self.guard
            self.owner = self.next_owner()
            for _ in range(KEEP):
                self.step += 1
                self.owner.commit(saved(self.folder, self.step, self.owner.lease.head.epoch))

        sleeper.store.before = sleep
        sleeper.collector.collect()
        assert self.owner is not sleeper
        self.happened("nod off")

    def turn_bad(self) -> None:
        """What `restore` does about a checkpoint that does not verify."""
        bad = self.draw.choice(self.owner.lease.head.retained)
        self.owner.lease.write(lambda head: without_bad(head, [bad.key]))
        self.readers = [reader for reader in self.readers if reader.entry != bad]
        self.happened("bad")

    def read(self) -> None:
        """Readers come, go on, and go."""
        for reader in list(self.readers):
            fate = self.draw.random()
            if self.clock.time >= reader.until or fate < 0.01:
                self.readers.remove(reader)
                if reader.pin is not None and fate < 0.5:  # the others died, and their pins stay
                    self.raw.delete(reader.key)
            elif reader.pin is not None and fate < 0.5:
                self.pin(reader)
        retained = self.head().retained if self.draw.random() < 0.05 else ()
        if retained:
            entry = self.draw.choice(retained)
            needs = frozenset(self.needed([entry], self.manifests))
            name = f"{self.step}-{len(self.readers)}"
            reader = Reader(name, entry, needs, self.clock.time + GRACE, None)
            if self.draw.random() < 0.8:
                self.pin(reader)
                if entry not in self.head().retained:
                    return
                self.happened("pin")
            self.readers.append(reader)

    def pin(self, reader: Reader) -> None:
        """Set or refresh its pin; each writing differs from the last, as a reader's must."""
        ttl = self.draw.choice([GRACE / 4, GRACE, 3 * GRACE]) + self.clock.time * 1e-6
        reader.pin = self.raw.swap(reader.key, encode(Pin(entry=reader.entry, ttl_s=ttl)), reader.pin)
        assert reader.pin is not None
        reader.until = self.clock.time + ttl

    def left(self) -> tuple[set[str], set[str]]:
        """What is in the store after the last owner's sweep, and what should be."""
        for key in list(self.raw.keys("pins/")):
            self.raw.delete(key)
        self.readers = []
        self.owner.lease.release()
        self.owner = self.next_owner()
        self.clock.time += GRACE
        self.owner.collector.collect()
        self.manifests, self.named_at = Manifests(self.raw), ("", set())
        assert len(self.head().retained) == KEEP
        return set(self.raw.keys("")), {HEAD, *OTHERS, *self.named()}


class Serial:
    """A thread pool without threads: 10,000 of them take longer than what is tested."""

    def __init__(self, threads: int) -> None:
        del threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, call: Callable[..., Any], items: Any) -> Iterator[Any]:
        return map(call, items)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "ThreadPoolExecutor", Serial)


@dataclass
class Server:
    """A server of objects, and the way to it that counts."""

    port: int
    proxy: FaultProxy
    monkeypatch: pytest.MonkeyPatch

    def store(self, prefix: str, counted: bool) -> S3Store:
        url = self.proxy.url if counted else f"http://127.0.0.1:{self.port}"
        self.monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = S3Store(Settings(bucket=BUCKET, prefix=prefix), Patience(60, Clock(), lambda event: None))
        store.read(HEAD)
        return store


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as port, FaultProxy(port) as proxy:
        yield Server(port, proxy, monkeypatch)


def test_ten_thousand_checkpoints_leave_what_head_names(tmp_path: Path, serial: None) -> None:
    world = World(MemoryStore(), tmp_path / "saved", seed=1)
    world.live(10_000, collect_every=5)
    world.owner.lease.write(lambda head: {"final": final(world)})
    assert min(world.seen[what] for what in ("take-over", "kill", "sleep", "wake", "bad", "nod off")) > 10, (
        world.seen
    )
    assert world.seen["pin"] > 200
    assert world.deleted > 20_000
    left, named = world.left()
    assert left == named
    newest = world.owner.manifests.get(world.head().retained[0])
    found = world.raw.read(newest.files["state"].key)
    assert found is not None
    assert found.data.startswith(f"state {world.step:08d}".encode())


def test_three_hundred_in_a_bucket_leave_what_head_names(
    tmp_path: Path, serial: None, server: Server
) -> None:
    """The requests of a commit and of a restore are then as many as after the first."""
    store = server.store("short", counted=False)
    short = World(store, tmp_path / "saved", seed=2)
    short.owner.commit(saved(short.folder, 1, 1))
    first = requests(short, server, tmp_path)
    store.close()
    store = server.store("long", counted=False)
    world = World(store, tmp_path / "saved", seed=3)
    world.live(300, collect_every=10, trouble=5)
    assert min(world.seen.get(what, 0) for what in ("take-over", "bad", "pin")) > 0, world.seen
    left, named = world.left()
    assert left == named
    assert requests(world, server, tmp_path) == first
    store.close()


def final(world: World) -> Entry:
    """What the end of a run leaves: written as a checkpoint is, and named by `HEAD.final` alone."""
    owner, data = world.owner, b"the adapter"
    epoch, sha256 = owner.lease.head.epoch, hashlib.sha256(data).hexdigest()
    blob = Blob(key=blob_key(epoch, sha256, 0), size=len(data), sha256=sha256)
    manifest = Manifest(id="final", step=world.step, epoch=epoch, parent=None, files={"adapter": blob})
    key = manifest_key(world.step, epoch, "final")
    assert world.raw.create(blob.key, data)
    assert world.raw.create(key, encode(manifest))
    return owner.manifests.keep(key, manifest)


@pytest.mark.parametrize("was_a_checkpoint", [False, True])
def test_what_the_end_leaves_stays(tmp_path: Path, was_a_checkpoint: bool) -> None:
    world = World(MemoryStore(), tmp_path / "saved", seed=0)
    kept = world.owner.commit(saved(world.folder, 1, 1)) if was_a_checkpoint else final(world)
    world.owner.lease.write(lambda head: {"final": kept})
    for step in range(2, 7):
        world.owner.commit(saved(world.folder, step, 1))
    for _ in range(2):  # what was dropped, and the sweep
        world.clock.time += GRACE
        world.owner.collector._sweep_at = None
        world.owner.collector.collect()
    left, named = world.left()
    assert left == named
    assert kept.key in left


def test_checkpoint_that_rots_under_its_owner_is_swept_and_not_relied_on(tmp_path: Path) -> None:
    """A trainer that crashed goes on from the one before, and makes the same bytes once more."""
    store = MemoryStore()
    world = World(store, tmp_path / "saved", seed=0)
    owner = world.owner
    for step in (1, 2):
        owner.commit(saved(world.folder, step, 1))
    world.clock.time += GRACE
    owner.collector.collect()
    newest = owner.lease.head.retained[0]
    blob = owner.manifests.get(newest).files["state"]
    store.objects[blob.key] = Object(b"~" * blob.size, "rotten")
    owner.committer.trust(restored(owner, tmp_path / "back"))
    assert owner.lease.head.bad == (newest.key,)
    again = owner.commit(replace(saved(world.folder, 2, 1), id="00000002-0001-again"))
    fresh = owner.manifests.get(again).files["state"]
    assert fresh.key == f"{blob.key}-1"
    assert store.objects[fresh.key].data == b"state 00000002-0001"
    owner.collector.collect()
    world.clock.time += GRACE
    assert {newest.key, blob.key} <= set(owner.collector.collect())
    assert set(store.objects) == {HEAD, *OTHERS, *world.named()}


def test_requests_are_as_many_after_a_thousand_checkpoints(tmp_path: Path, serial: None) -> None:
    world = World(MemoryStore(), tmp_path / "saved", seed=0)

    def calls(act: Callable[[], object]) -> int:
        before = world.owner.store.calls
        act()
        return world.owner.store.calls - before

    def again() -> None:
        """On the same counter."""
        world.owner = Process(world.owner.store, world.clock, "again")
        restored(world.owner, tmp_path / f"back-{world.step}")

    found = []
    for last in (1, 1000):
        while world.step < last:
            world.step += 1
            world.owner.commit(saved(world.folder, world.step, 1))
        world.step += 1
        commit_calls = calls(lambda: world.owner.commit(saved(world.folder, world.step, 1)))
        world.owner.lease.release()
        store, before = world.owner.store, world.owner.store.calls
        again()
        found.append((commit_calls, store.calls - before))
    assert found[0] == found[1]
    assert found[0] == (4, 2 + 1 + 4)  # 2 blobs, manifest, HEAD; HEAD twice, manifest, 4 blobs


def requests(world: World, server: Server, folder: Path) -> list[list[str]]:
    """Methods of the requests that take the run over and restore it, and of a commit after another."""
    prefix = world.raw.place.rpartition("/")[2]
    store = server.store(prefix, counted=True)

    def asked(act: Callable[[], object]) -> list[str]:
        server.proxy.clear()
        act()
        return sorted(method for method, _ in server.proxy.requests)

    def take() -> None:
        world.owner = Process(Between(store), world.clock, "again")
        restored(world.owner, folder / prefix)

    world.owner.lease.release()
    found = [asked(take)]
    world.owner.commit(saved(world.folder, 1001, 1))
    found.append(asked(lambda: world.owner.commit(saved(world.folder, 1002, 1))))
    store.close()
    assert found[1] == ["PUT"] * 4  # state, checkpoint.json, manifest, HEAD
    return found


def restored(owner: Process, folder: Path) -> Manifest:
    folder.mkdir()
    found = restore(owner.store, owner.lease, owner.manifests, folder, lambda event: None)
    assert found is not None
    owner.committer.trust(found[1])
    return found[1]
