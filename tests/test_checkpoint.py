"""One checkpoint as a folder: what is sealed verifies, and what is broken is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.files import MANIFEST, publish, seal, verify
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
    """A run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outbox = path / "outbox"
        self.outbox.mkdir(exist_ok=True)


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
