"""Checkpoints: what is sealed verifies, what is broken is named, and no kill costs what is committed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.files import MANIFEST, publish, seal, verify
from runner.checkpoint.local import LocalStore
from runner.durable import disk
from runner.errors import AccessDenied, DataError, JobError, RunnerError, StorageError


def make(outbox: Path, step: int, parent: str | None, attempt: int = 1) -> Path:
    """A published checkpoint."""
    name = f"{step:08d}-{attempt:04d}"
    folder = outbox.parent / f"saving-{step}-{attempt}"
    (folder / "inner").mkdir(parents=True)
    (folder / "state.json").write_text(f'{{"step": {step}}}')
    (folder / "inner" / "weights").write_bytes(bytes(range(256)) * 8)
    seal(folder, id=name, step=step, parent=parent, extra={"attempt": attempt})
    outbox.mkdir(exist_ok=True)
    return publish(folder, outbox, name)


class World:
    """A run's folder with its store, opened again at will."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outbox = path / "outbox"
        self.outbox.mkdir(exist_ok=True)
        self.events: list[Mapping[str, Any]] = []

    def store(self, fresh: bool = False) -> LocalStore:
        store = LocalStore(self.path / "checkpoints", 2, self.events.append)
        store.open(fresh)
        return store

    def with_steps(self, *steps: int) -> LocalStore:
        store = self.store(fresh=True)
        parent = None
        for step in steps:
            parent = store.commit(make(self.outbox, step, parent)).id
        return store

    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir() if path.is_dir())

    def said(self, event: str) -> list[Mapping[str, Any]]:
        return [one for one in self.events if one["event"] == event]

    def flip(self, name: str) -> None:
        """Change one byte of a committed checkpoint, as a bad disk does."""
        path = self.path / "checkpoints" / name / "inner" / "weights"
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.write_bytes(data)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- one folder ---


def test_sealed_and_published_folder_verifies(world: World) -> None:
    folder = make(world.outbox, 7, "00000005-0001")
    sealed = verify(folder)
    assert (sealed.id, sealed.step, sealed.parent) == ("00000007-0001", 7, "00000005-0001")
    assert sorted(sealed.files) == ["inner/weights", "state.json"]
    assert sealed.files["inner/weights"].size == 2048
    assert sealed.extra == {"attempt": 1}
    assert folder == world.outbox / sealed.id


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def manifest(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (lambda folder: (folder / "state.json").unlink(), DataError, "state.json is missing"),
        (write("inner/more", b"x"), DataError, "inner/more does not belong"),
        (write("state.json", b"{}"), DataError, "state.json has 2 bytes, not 11"),
        (write("state.json", b'{"step": 8}'), DataError, "state.json has SHA-256"),
        (lambda folder: (folder / MANIFEST).unlink(), DataError, "checkpoint.json is missing"),
        (write(MANIFEST, b'{"format": 1, "id"'), DataError, "checkpoint.json is not JSON"),
        (write(MANIFEST, b'{"id": "x"}'), DataError, "not an object with a format"),
        (write(MANIFEST, b"[]"), DataError, "not an object with a format"),
        (manifest(step=-1), DataError, "step"),
        (manifest(id="../up"), DataError, "id"),
        (manifest(format=2), JobError, "written in format 2"),
        (lambda folder: (folder / "link").symlink_to("state.json"), DataError, "link is a link"),
    ],
)
def test_verify_names_what_is_wrong(
    world: World, harm: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    folder = make(world.outbox, 7, None)
    harm(folder)
    with pytest.raises(kind, match=message):
        verify(folder)


def test_seal_refuses_a_sealed_folder_and_publish_an_existing_id(world: World) -> None:
    folder = make(world.outbox, 7, None)
    with pytest.raises(DataError, match="sealed already"):
        seal(folder, id="x", step=8, parent=None, extra={})
    second = world.path / "second"
    second.mkdir()
    (second / "file").touch()
    with pytest.raises(StorageError, match="publish checkpoint 00000007-0001"):
        publish(second, world.outbox, "00000007-0001")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, AccessDenied),
        (errno.EROFS, AccessDenied),
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EIO, StorageError),
    ],
)
def test_disk_errors_become_exit_codes(tmp_path: Path, number: int, kind: type[RunnerError]) -> None:
    with pytest.raises(kind, match=r"save it: .*remedy:"), disk("save it", tmp_path):
        raise OSError(number, os.strerror(number))


# --- the store ---


def test_commit_moves_the_folder_and_head_names_it(world: World) -> None:
    world.with_steps(5, 10)
    head = json.loads((world.path / "checkpoints" / "HEAD").read_text())
    assert head["format"] == 1
    assert head["head"] == "00000010-0001"
    assert [entry["step"] for entry in head["retained"]] == [10, 5]
    assert list(world.outbox.iterdir()) == []
    newest = world.store().newest_valid()
    assert newest is not None
    assert newest.step == 10


def test_only_keep_last_stay(world: World) -> None:
    world.with_steps(5, 10, 15)
    assert world.folders() == ["00000010-0001", "00000015-0001"]


def test_a_run_without_checkpoints_restores_none(world: World) -> None:
    assert world.store(fresh=True).newest_valid() is None
    assert world.store(fresh=True).newest_valid() is None


def test_corrupt_newest_falls_back_loudly_and_never_comes_back(world: World) -> None:
    world.with_steps(5, 10)
    world.flip("00000010-0001")
    store = world.store()
    restored = store.newest_valid()
    assert restored is not None
    assert restored.step == 5
    assert "inner/weights has SHA-256" in world.said("bad")[0]["reason"]
    assert "Going back to checkpoint 00000005-0001, step 5" in world.said("warning")[0]["message"]
    # The bad one goes on from the head and might verify on a second reading: it stays out all the same.
    world.flip("00000010-0001")
    store = world.store()
    store.recover(world.outbox)
    newest = store.newest_valid()
    assert newest is not None
    assert newest.step == 5
    assert world.said("removed")[0]["reason"] == "it did not verify before"
    store.commit(make(world.outbox, 10, "00000005-0001", attempt=2))
    assert world.folders() == ["00000005-0001", "00000010-0002"]


def test_all_corrupt_is_never_step_0(world: World) -> None:
    world.with_steps(5, 10)
    world.flip("00000005-0001")
    world.flip("00000010-0001")
    for _ in range(2):
        with pytest.raises(DataError, match="no checkpoint of this run is whole"):
            world.store().newest_valid()
    world.flip("00000010-0001")  # the disk is back
    restored = world.store().newest_valid()
    assert restored is not None
    assert restored.step == 10


def test_another_whole_checkpoint_in_its_place_is_not_restored(world: World) -> None:
    world.with_steps(5, 10)
    target = world.path / "checkpoints" / "00000010-0001"
    target.rename(world.path / "away")
    folder = make(world.path / "other", 11, None)
    manifest(id="00000010-0001")(folder)
    folder.rename(target)
    restored = world.store().newest_valid()
    assert restored is not None
    assert restored.step == 5
    assert "not the one that was committed" in world.said("bad")[0]["reason"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, DataError, "HEAD is missing"),
        (b"", DataError, "cannot be read"),
        (b'{"format": 1, "head": null, "retained": [], "bad": [], "sha256": "0"}', DataError, "checksum"),
        (b'{"format": 9}', JobError, "format 9"),
    ],
)
def test_head_that_cannot_be_trusted_is_never_step_0(
    world: World, content: bytes | None, kind: type[Exception], message: str
) -> None:
    world.with_steps(5)
    head = world.path / "checkpoints" / "HEAD"
    head.unlink()
    if content is not None:
        head.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        world.store()
    assert "remedy" in str(caught.value)
    if content is None:
        with pytest.raises(DataError, match="HEAD is missing"):
            world.store(fresh=True)  # there are checkpoints, so it is not fresh


def test_a_run_that_had_a_head_must_have_one(world: World) -> None:
    with pytest.raises(DataError, match="HEAD is missing"):
        world.store(fresh=False)


# --- what is left over ---


@pytest.mark.parametrize(
    ("parents", "committed"),
    [
        (["00000005-0001"], [10]),
        (["00000005-0001", "00000010-0001"], [10, 11]),
        (["00000005-0001", "00000005-0001"], [10]),
        (["00000004-0001"], []),
        ([None], []),
    ],
)
def test_leftovers_that_go_on_from_the_head_are_committed(
    world: World, parents: list[str | None], committed: list[int]
) -> None:
    world.with_steps(5)
    for step, parent in enumerate(parents, start=10):
        make(world.outbox, step, parent)
    store = world.store()
    store.recover(world.outbox)
    assert [event["step"] for event in world.said("commit")] == committed
    assert len(world.said("removed")) == len(parents) - len(committed)
    assert store.newest is not None
    assert store.newest.step == (committed or [5])[-1]
    assert list(world.outbox.iterdir()) == []


def test_leftover_that_is_broken_is_removed_and_named(world: World) -> None:
    world.with_steps(5)
    (make(world.outbox, 10, "00000005-0001") / "state.json").write_text("{}")
    (world.outbox / "note.txt").write_text("a person's")
    store = world.store()
    store.recover(world.outbox)
    assert [event["id"] for event in world.said("removed")] == ["00000010-0001", "note.txt"]
    assert "has 2 bytes" in world.said("removed")[0]["reason"]
    assert store.newest is not None
    assert store.newest.step == 5


def test_a_folder_that_head_does_not_name_is_not_restored(world: World) -> None:
    world.with_steps(5)
    make(world.outbox, 99, None, attempt=9).rename(world.path / "checkpoints" / "00000099-0009")
    store = world.store()
    store.recover(world.outbox)
    restored = store.newest_valid()
    assert restored is not None
    assert restored.step == 5
    assert world.folders() == ["00000005-0001"]


def test_commit_that_does_not_verify_changes_nothing(world: World) -> None:
    store = world.with_steps(5)
    folder = make(world.outbox, 10, "00000005-0001")
    (folder / "state.json").unlink()
    with pytest.raises(DataError, match=r"state.json is missing"):
        store.commit(folder)
    restored = world.store().newest_valid()
    assert restored is not None
    assert restored.step == 5


# --- killed at every operation ---


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill of a process, unlike one of the machine, loses nothing that is written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


OPERATIONS = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]
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
def test_kill_at_every_operation_of_a_whole_life(tmp_path: Path) -> None:
    """Seal, publish, commit, collect: after a kill, what was committed stands, and the next commit works."""
    number = 0
    while True:
        path = tmp_path / str(number)
        path.mkdir()
        world = World(path)
        world.with_steps(5, 10)

        def life(world: World = world) -> None:
            store = world.store()
            store.commit(make(world.outbox, 15, "00000010-0001"))

        killed = killed_at(number, life)
        store = world.store()
        store.recover(world.outbox)
        restored = store.newest_valid()
        assert restored is not None
        assert restored.step in (10, 15)
        assert not world.said("bad")
        assert len(world.folders()) == 2
        assert list(world.outbox.iterdir()) == []
        store.commit(make(world.outbox, 20, restored.id, attempt=2))
        again = world.store().newest_valid()
        assert again is not None
        assert again.step == 20
        if not killed:
            break
        number += 1
    assert number > 15, "too few operations seen: the patch has missed them"


@pytest.mark.usefixtures("quick_disk")
def test_kill_at_every_operation_of_a_first_start_and_of_a_recovery(tmp_path: Path) -> None:
    """A start that was killed can be given again, from an empty folder and from one with leftovers."""
    for leftovers in (False, True):
        number = 0
        killed = True
        while killed:
            path = tmp_path / f"{leftovers}-{number}"
            path.mkdir()
            world = World(path)
            if leftovers:
                world.with_steps(5, 10)
                make(world.outbox, 15, "00000010-0001")
                make(world.outbox, 12, "00000005-0001", attempt=2)
                world.flip("00000005-0001")

            def start(world: World = world, fresh: bool = not leftovers) -> None:
                store = world.store(fresh)
                store.recover(world.outbox)
                store.newest_valid()

            killed = killed_at(number, start)
            number += 1
            store = world.store(fresh=not leftovers)
            store.recover(world.outbox)
            restored = store.newest_valid()
            assert (restored.step if restored else None) == (15 if leftovers else None)
            assert list(world.outbox.iterdir()) == []
