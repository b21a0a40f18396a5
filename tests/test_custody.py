"""One supervisor's hold on a run in a folder: what is left over, what rots, and a kill at every operation."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import events
from runner.checkpoint.files import publish, seal
from runner.checkpoint.lease import Lease
from runner.checkpoint.store import Transient
from runner.errors import AccessDenied, DataError, Preempted, StorageError
from runner.events import EventLog
from runner.manifest import Job
from runner.supervisor import custody as custody_module
from runner.supervisor.custody import Custody
from runner.supervisor.final import gather, spread
from runner.supervisor.journal import Journal
from runner.supervisor.notices import Notices
from runner.supervisor.result import Result, read
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.screen import Screen
from tests.small_job import SMALL


def make(run: Path, step: int, parent: str | None, attempt: int = 1) -> Path:
    """A published checkpoint."""
    name = f"{step:08d}-{attempt:04d}"
    folder = run / f"saving-{step}-{attempt}"
    (folder / "inner").mkdir(parents=True)
    (folder / "state.json").write_text(f'{{"step": {step}}}')
    (folder / "inner" / "weights").write_bytes(bytes(range(256)) * 8)
    seal(folder, id=name, step=step, parent=parent, extra={"attempt": attempt})
    (run / "outbox").mkdir(exist_ok=True)
    return publish(folder, run / "outbox", name)


class World:
    """A run's folder, its supervisor opened again at will."""

    def __init__(self, path: Path) -> None:
        self.runs = path
        self.folder = RunFolder(path / "small")
        self.run = self.folder.path

    @contextlib.contextmanager
    def custody(self, uri: str | None = None) -> Iterator[Custody]:
        job = Job.model_validate({**SMALL, "checkpoints": {"keep_last": 2, "uri": uri}})
        with (
            self.folder.locked() as lock,
            Notices() as notices,
            contextlib.closing(Screen()) as screen,
            EventLog(self.folder.events) as log,
            contextlib.closing(
                Custody(
                    job,
                    self.folder,
                    lock,
                    notices,
                    Journal(log, screen, notices.wake),
                    geometry=dict,
                    memory_peak=lambda: None,
                )
            ) as custody,
        ):
            yield custody

    @contextlib.contextmanager
    def taken(self) -> Iterator[Custody]:
        with self.custody() as custody:
            assert custody.take(lambda look: None)
            yield custody

    def with_steps(self, *steps: int) -> None:
        with self.taken() as custody:
            parent = None
            for step in steps:
                folder = make(self.run, step, parent)
                custody.shipper.offer(folder)
                custody.drain()
                parent = folder.name

    def said(self, event: str) -> list[dict[str, Any]]:
        return [one for one in events.read(self.folder.events) if one["event"] == event]

    def outbox(self) -> list[str]:
        return sorted(path.name for path in (self.run / "outbox").iterdir())

    def newest(self) -> int | None:
        """The step that a new supervisor goes on from."""
        with self.taken() as custody:
            found = custody.restore()
            return None if found is None else found.step


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FIVE = "00000005-0001"


@pytest.mark.parametrize(
    ("parents", "committed"),
    [
        ([FIVE], [10]),
        ([FIVE, "00000010-0001"], [10, 11]),
        ([FIVE, FIVE], [10]),
        (["00000004-0001"], []),
        ([None], []),
    ],
)
def test_leftovers_that_go_on_from_the_head_are_committed(
    world: World, parents: list[str | None], committed: list[int]
) -> None:
    world.with_steps(5)
    before = len(world.said("commit"))
    for step, parent in enumerate(parents, start=10):
        make(world.run, step, parent)
    with world.taken() as custody:
        custody.restore()
        custody.leftovers()
    assert [event["step"] for event in world.said("commit")[before:]] == committed
    assert all(event["leftover"] for event in world.said("commit")[before:])
    assert len(world.said("removed")) == len(parents) - len(committed)
    assert world.outbox() == []
    assert world.newest() == (committed or [5])[-1]


def test_leftover_that_is_broken_is_removed_and_named(world: World) -> None:
    world.with_steps(5)
    (make(world.run, 10, FIVE) / "state.json").write_text("{}")
    (world.run / "outbox" / "note.txt").write_text("a person's")
    with world.taken() as custody:
        custody.leftovers()
    assert [event["id"] for event in world.said("removed")] == ["00000010-0001", "note.txt"]
    assert "has 2 bytes" in world.said("removed")[0]["reason"]
    assert world.newest() == 5


def test_leftover_that_was_committed_is_not_committed_twice(world: World) -> None:
    world.with_steps(5)
    make(world.run, 5, None)
    with world.taken() as custody:
        custody.leftovers()
    assert world.said("removed")[0]["reason"] == "it is committed already"
    assert world.newest() == 5


def test_newer_checkpoint_replaces_the_one_that_waits(world: World) -> None:
    with world.taken() as custody:
        folders = [make(world.run, step, None, attempt=step) for step in (1, 2, 3, 4, 5)]
        for folder in folders:
            custody.shipper.offer(folder)
        custody.drain()
        assert custody.newest is not None and custody.newest.step == 5
    assert len(world.said("replaced")) >= 3
    assert len(world.said("replaced")) + len(world.said("commit")) == 5
    assert world.outbox() == []


def test_nothing_on_this_machine_stands_in_for_the_store(world: World) -> None:
    """The copy for restarts is whole; the store's is not. A start must see that."""
    world.with_steps(5, 10)
    assert (world.run / "newest" / "00000010-0001").is_dir()
    manifest = next((world.run / "checkpoints" / "checkpoints").glob("00000010-*"))
    blob = world.run / "checkpoints" / json.loads(manifest.read_text())["files"]["state.json"]["key"]
    blob.write_bytes(blob.read_bytes()[:-1] + b"~")
    assert world.newest() == 5
    assert "has SHA-256" in world.said("bad")[0]["reason"]


def test_run_whose_identity_is_gone_is_not_begun_again(world: World) -> None:
    from runner.supervisor.identity import Identity

    world.with_steps(5)
    with world.taken() as custody, pytest.raises(DataError, match=r"run\.json is missing"):
        custody.begin(Identity(job=SMALL, pins={}, fingerprints={}, versions={}))


def final(world: World) -> Path:
    """What a run ends with."""
    folder = world.run / "final"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    seal(folder, id="final", step=5, parent=FIVE, extra={})
    return folder


def test_end_that_a_second_notice_gives_up_is_no_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.with_steps(5)
    with world.custody() as custody:
        monkeypatch.setattr(custody.shipper, "start", lambda: None)  # it is busy: the end waits
        assert custody.take(lambda look: None)
        custody._notices.first, custody._notices.hurry = "SIGTERM", True
        with pytest.raises(Preempted, match="SIGTERM: stopped before the store had what the run ends with"):
            custody.finish(final(world))
    assert world.newest() == 5  # and the run goes on


def test_end_that_does_not_verify_is_no_end(world: World) -> None:
    world.with_steps(5)
    folder = final(world)
    (folder / "result.json").write_text("{ }")
    with world.taken() as custody, pytest.raises(DataError, match="changed while it was sent"):
        custody.finish(folder)
    assert world.newest() == 5


ENDED = Result(
    name="small", outcome="done", exit_code=0, steps=5, attempts=1, metrics={}, restarts=[], error=None,
    adapter="adapter", checkpoint=FIVE, versions={}, facts={}, seconds=1.0,
)  # fmt: skip


def test_end_is_put_over_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    def fill(name: str, **files: str) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        for file, content in files.items():
            path = folder.path / file.replace("__", "/").replace("_json", ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return folder

    there = fill(
        "there", adapter__weights="new", evaluation__before_json="new", evaluation__after_json="new",
        result_json="of a command that was preempted",
    )  # fmt: skip
    here = fill(
        "here", adapter__weights="old", adapter__other="old", evaluation__before_json="old",
        evaluation__mine_json="mine", result_json="old",
    )  # fmt: skip
    gathered = gather(there, ENDED)
    spread(gathered.rename(here.path / "final"), here)
    assert read(here.result) == ENDED
    here.result.unlink()
    found = {
        path.relative_to(here.path).as_posix(): path.read_text()
        for path in here.path.rglob("*")
        if path.is_file()
    }
    assert found == {
        "adapter/weights": "new",
        "evaluation/before.json": "new",
        "evaluation/after.json": "new",
        "evaluation/mine.json": "mine",
    }


def test_run_that_is_taken_while_something_else_is_done_is_renewed_and_given_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody_module, "SHORT", 0.0)
    monkeypatch.setattr(custody_module, "RENEW_EVERY", 0.05)
    read = Lease.take

    def slow(lease: Lease) -> bool:
        time.sleep(0.2)
        return read(lease)

    monkeypatch.setattr(Lease, "take", slow)
    with world.custody() as custody:

        def fetch(look: Callable[[], str | None]) -> None:
            until = time.monotonic() + 10
            while not custody.taken or custody.head.seq < 3:
                assert time.monotonic() < until
                look()
                time.sleep(0.02)
            raise Preempted("SIGTERM: stopped while fetching")

        with pytest.raises(Preempted):
            custody.take(fetch)
    head = custody.head
    assert (head.state, head.epoch) == ("released", 1)


def test_commit_that_failed_is_never_taken_for_one_that_is_through(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(key: str, data: bytes, etag: str | None) -> str | None:
        raise AccessDenied("the right is gone")

    with world.taken() as custody:
        monkeypatch.setattr(custody._holding.store, "swap", swap)
        monkeypatch.setattr(custody.shipper, "_wake", lambda: time.sleep(0.3))  # the thread is slow here
        custody.shipper.offer(make(world.run, 5, None))
        with pytest.raises(AccessDenied):
            custody.drain()


def silence(custody: Custody, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the store changes nothing."""

    def swap(key: str, data: bytes, etag: str | None) -> str | None:
        raise Transient(StorageError("no answer"))

    monkeypatch.setattr(custody._holding.store, "swap", swap)


def until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_store_that_is_silent_at_the_end_does_not_hold_the_command(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody_module, "TTL", 0.5)
    began = time.monotonic()
    with world.taken() as custody:
        silence(custody, monkeypatch)
    assert time.monotonic() - began < 10
    assert "the run is not given back" in world.said("warning")[0]["message"]


def test_second_notice_does_not_wait_for_a_silent_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody_module, "LAST", 0.5)
    began = time.monotonic()
    with world.taken() as custody:
        silence(custody, monkeypatch)
        custody.shipper.offer(make(world.run, 5, None))
        until(lambda: bool(world.said("store")))  # it is under way
        custody._notices.first, custody._notices.hurry = "SIGINT", True
        with pytest.raises(Preempted, match="no time is left"):
            custody.drain()
    assert time.monotonic() - began < 10
    assert world.outbox() == [FIVE]


def test_failed_lease_ends_the_wait_of_a_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with world.taken() as custody:
        silence(custody, monkeypatch)
        custody.shipper.offer(make(world.run, 5, None))
        until(lambda: bool(world.said("store")))
        custody.shipper.failure = StorageError("the keeper has given up")
    assert time.monotonic() - began < 10


def test_files_of_others_in_the_store_are_left_alone(world: World) -> None:
    store = world.run / "checkpoints"
    for place in ("blobs/.DS_Store", "checkpoints/.nfs0001", "blobs/000001/note.txt"):
        (store / place).parent.mkdir(parents=True, exist_ok=True)
        (store / place).write_text("not ours")
    world.with_steps(5, 10, 15)
    assert not world.said("warning")
    assert world.newest() == 15
    assert {path.name for path in store.rglob("*") if path.is_file()} >= {".DS_Store", ".nfs0001", "note.txt"}


def test_probe_waits_for_a_store_that_is_silent_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.custody(str(world.runs / "store")) as custody:
        swap, failures = custody._holding.store.swap, [Transient(StorageError("no answer"))]

        def late(key: str, data: bytes, etag: str | None) -> str | None:
            if failures:
                raise failures.pop()
            return swap(key, data, etag)

        monkeypatch.setattr(custody._holding.store, "swap", late)
        custody.probe()
    assert len(world.said("store")) == 1


def test_end_is_gathered_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    folder = RunFolder(tmp_path)
    folder.job.write_text("name: small")
    monkeypatch.setattr(os, "link", link)
    assert (gather(folder, ENDED) / "job.yaml").read_text() == "name: small"


# --- killed at every operation ---


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill of a process, unlike one of the machine, loses nothing that is written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


OPERATIONS = [
    (os, name) for name in ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir", "pwrite")
]
"""Everything that changes the disk or orders the changes goes through one of these."""


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that dies just before its operation `number`; False if it had fewer."""
    child = os.fork()
    if child == 0:
        left = [number]

        def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **settings: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return operation(*args, **settings)

            return run

        try:
            for module, name in OPERATIONS:
                setattr(module, name, deadly(getattr(module, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the work itself failed"
    return status == 9


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("first", [0, 1, 2])
def test_kill_at_every_operation_of_a_life(tmp_path: Path, first: int) -> None:
    """Take, restore, leftovers, seal, publish, commit, collect, give back: what was committed stands, and the
    next supervisor goes on. Every third operation each, because one life is a third of a second."""
    number = first
    while True:
        world = World(tmp_path / str(number))
        world.with_steps(5, 10)
        make(world.run, 15, "00000010-0001")
        make(world.run, 12, FIVE, attempt=2)

        def life(world: World = world) -> None:
            with world.taken() as custody:
                custody.restore()
                custody.leftovers()
                custody.shipper.offer(make(world.run, 20, "00000015-0001"))
                custody.drain()

        killed = killed_at(number, life)
        with world.taken() as custody:
            before = custody.newest
            assert before is not None and before.step in (10, 15, 20)
            restored = custody.restore()
            assert restored is not None and restored.step == before.step
            custody.leftovers()
            newest = custody.newest
            assert newest is not None and newest.step in (15, 20)
            custody.shipper.offer(make(world.run, 25, newest.id, attempt=3))
            custody.drain()
        assert not world.said("bad")
        assert world.newest() == 25
        assert world.outbox() == []
        if not killed:
            break
        number += 3
    assert number > 40, "too few operations seen: the patch has missed them"


@pytest.mark.usefixtures("quick_disk")
def test_kill_at_every_operation_of_a_first_start(tmp_path: Path) -> None:
    number, killed = 0, True
    while killed:
        world = World(tmp_path / str(number))

        def start(world: World = world) -> None:
            with world.taken() as custody:
                custody.restore()
                custody.leftovers()

        killed = killed_at(number, start)
        assert world.newest() is None
        number += 1
    assert number > 8
