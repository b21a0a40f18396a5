"""The protocol under every interleaving: the real code over a store in memory, one request at a time.

An owner that commits and then collects what a killed owner left, and a waiter that takes the run over,
restores and goes on. Before each request a scheduler decides who is next and whether a swap's answer is
lost; all executions are tried that differ from "the same one goes on, and is answered" in at most `DEPTH`
decisions. A process that is not chosen again until the other has ended is the paused zombie. After every
request an observer looks:

    P1, P5   `HEAD` can be read, and everything that it retains is there, byte for byte
    P3       the swaps of `HEAD` are one line: each number once, no epoch after a higher one

An observer that sees nothing proves nothing, so two rules are taken out and must be missed.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from runner.checkpoint import collect, commit, restore
from runner.checkpoint.collect import GRACE, Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import Sealed, seal
from runner.checkpoint.head import HEAD, TTL, Head, Manifest, Owner, blob_key, decode
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.memory import MemoryStore
from runner.checkpoint.store import Object, Patience, Transient
from runner.errors import NotOwner, StorageError

DEPTH = 2

STEPS = (2, 4, 6, 8)


class Clock:
    """A waiter's time runs: whoever sleeps, sleeps for a ttl."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += max(seconds, TTL)


class Serial:
    """A thread pool without threads, so that a run can be repeated."""

    def __init__(self, threads: int) -> None:
        del threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, call: Callable[..., Any], items: Any) -> Iterator[Any]:
        return map(call, items)


class Watched(MemoryStore):
    """Looks at itself after every change."""

    def __init__(self, objects: dict[str, Object]) -> None:
        super().__init__()
        self.objects = dict(objects)
        self._count = len(objects)
        self.line = [decode(Head, objects[HEAD].data, HEAD)]

    def look(self) -> None:
        head = decode(Head, self.objects[HEAD].data, HEAD)
        last = self.line[-1]
        if head != last:
            assert head.seq == last.seq + 1, "P3: two swaps from one state"
            assert head.epoch >= last.epoch, "P3: a fenced owner moved the run"
            self.line.append(head)
        for entry in head.retained:
            assert entry.key in self.objects, f"P1: manifest {entry.key} is gone"
            data = self.objects[entry.key].data
            assert hashlib.sha256(data).hexdigest() == entry.manifest_sha256, "P5: another manifest"
            for blob in decode(Manifest, data, entry.key).files.values():
                assert blob.key in self.objects, f"P1: {blob.key} of step {entry.step} is gone"
                held = self.objects[blob.key].data
                assert hashlib.sha256(held).hexdigest() == blob.sha256, f"P5: {blob.key} is damaged"


class Actor(threading.Thread):
    """One process; stops before every request until it is chosen."""

    def __init__(self, store: Watched, act: Callable[[Actor], None]) -> None:
        super().__init__(daemon=True)
        self.place = store.place
        self._store = store
        self._act = act
        self._go = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        self.at: str | None = "start"
        """The request that it wants to make; None when it has ended."""
        self._fault = ""
        self.failed: BaseException | None = None

    def run(self) -> None:
        self._go.acquire()
        try:
            self._act(self)
        except BaseException as error:  # noqa: BLE001 (told to the test by the scheduler)
            self.failed = error
        self.at = None
        self.stopped.release()

    def step(self, fault: str) -> None:
        """Make the request, and stop before the next."""
        self._fault = fault
        self._go.release()
        self.stopped.acquire()
        if self.failed is not None:
            raise self.failed

    def _request(self, name: str, call: Callable[[], Any]) -> Any:
        self.at = name
        self.stopped.release()
        self._go.acquire()
        fault = self._fault
        if fault == "before":
            raise Transient(StorageError("no answer"))
        answer = call()
        if fault == "after":
            raise Transient(StorageError("no answer"))
        return answer

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        done: str | None = self._request("swap", lambda: self._store.swap(key, data, etag))
        return done

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if name == "keys":
            return lambda prefix: self._request(name, lambda: list(call(prefix)))
        return lambda *arguments: self._request(name, lambda: call(*arguments))


class Process:
    """What a supervisor has in memory."""

    def __init__(self, store: Any, name: str) -> None:
        self.clock = Clock()
        patience = Patience(1e9, self.clock, lambda event: None)
        self.lease = Lease(store, Owner(attempt=name, host=name), self.clock, patience)
        self.manifests = Manifests(store)
        self.committer = Committer(store, self.lease, self.manifests, keep_last=2)
        self.collector = Collector(store, self.lease, self.manifests, self.committer, self.clock)
        self._store = store

    def take(self) -> int:
        """Own the run; the step to go on from."""
        assert self.lease.take()
        found = restore.restore(self._store, self.lease, self.manifests, Path(), lambda event: None)
        if found is None:
            return 0
        self.committer.trust(found[1])
        return found[0].step

    def train(self, step: int, saved: dict[int, Sealed], last: int) -> None:
        for number in STEPS:
            if step < number <= last:
                self.collector.dropped(self.committer.commit(saved[number])[1])


class World:
    """A run whose first owner was killed: one checkpoint is committed, and half of the next was sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved: dict[int, Sealed] = {}
        parent = None
        for step in STEPS:
            folder = path / f"{step:08d}"
            folder.mkdir()
            (folder / "state").write_text(f"state at {step}")
            (folder / "config.json").write_text("{}")
            self.saved[step] = seal(folder, id=folder.name, step=step, parent=parent, extra={})
            parent = folder.name
        store = MemoryStore()
        first = Process(store, "killed")
        first.take()
        first.train(0, self.saved, last=2)
        for step in (4, 6):
            data = f"state at {step}".encode()
            store.create(commit.blob_key(1, hashlib.sha256(data).hexdigest(), 0), data)
        self.objects = store.objects

    def run(self, choices: list[tuple[int, str]]) -> tuple[Watched, list[list[tuple[int, str]]]]:
        """One execution: `choices` first, then the same actor goes on.

        Returns:
            The store, and for each decision what could have been chosen, the default first.
        """
        store = Watched(self.objects)

        def own(actor: Actor) -> None:
            owner = Process(actor, "owner")
            with contextlib.suppress(NotOwner):
                owner.train(owner.take(), self.saved, last=4)
                owner.clock.time += GRACE
                owner.collector.collect()
                owner.train(4, self.saved, last=6)

        def wait(actor: Actor) -> None:
            waiter = Process(actor, "waiter")
            with contextlib.suppress(NotOwner):
                waiter.train(waiter.take(), self.saved, last=8)

        actors = [Actor(store, own), Actor(store, wait)]
        for actor in actors:
            actor.start()
        options: list[list[tuple[int, str]]] = []
        now = 0
        while any(actor.at is not None for actor in actors):
            if actors[now].at is None:
                now = 1 - now
            possible = [(now, "")]
            if actors[now].at == "swap":
                possible += [(now, "before"), (now, "after")]
            if actors[1 - now].at is not None:
                possible.append((1 - now, ""))
            position = len(options)
            now, fault = choices[position] if position < len(choices) else possible[0]
            options.append(possible)
            actors[now].step(fault)
            store.look()
        return store, options


def explore(world: World, depth: int) -> Iterator[Watched]:
    """Every execution that differs from the default in at most `depth` decisions."""
    stack: list[tuple[list[tuple[int, str]], int]] = [([], depth)]
    while stack:
        choices, left = stack.pop()
        store, options = world.run(choices)
        yield store
        if not left:
            continue
        taken = [
            choices[position] if position < len(choices) else possible[0]
            for position, possible in enumerate(options)
        ]
        for position in range(len(choices), len(options)):
            stack += [([*taken[:position], other], left - 1) for other in options[position][1:]]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(commit, "ThreadPoolExecutor", Serial)
    world = World(tmp_path)

    def download(store: Any, manifest: Manifest, folder: Path, say: Any) -> Sealed:
        for blob in manifest.files.values():
            held = store.read(blob.key)
            assert held is not None
            assert hashlib.sha256(held.data).hexdigest() == blob.sha256
        return world.saved[manifest.step]

    monkeypatch.setattr(restore, "download", download)
    return world


def test_no_interleaving_loses_a_checkpoint(world: World) -> None:
    ends = [store.line[-1] for store in explore(world, DEPTH)]
    assert len(ends) > 500
    # Not a proof of nothing: both went first, and both got as far as they could.
    assert {(head.epoch, head.retained[0].step) for head in ends} >= {(3, 8), (2, 6)}


def test_without_the_epoch_in_blob_keys_it_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "blob_key", lambda epoch, sha256, copy: blob_key(0, sha256, copy))
    fresh = world.path / "fresh"
    fresh.mkdir()
    with pytest.raises(AssertionError, match=r"P1: blobs/.* is gone"):
        list(explore(World(fresh), DEPTH))


def test_without_the_collectors_epoch_rule_it_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        collect, "garbage", lambda keys, named, epoch: [key for key in keys if key not in named]
    )
    with pytest.raises(AssertionError, match=r"P1: .* is gone"):
        list(explore(world, DEPTH))
