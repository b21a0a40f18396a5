"""One checkpoint as a folder of files and its manifest: sealed by the trainer, verified before every use.

    <id>/
        ...               whatever the trainer saved, folders allowed
        checkpoint.json   {"format": 1, "id", "step", "parent", "files": {name: {"size", "sha256"}}, "extra"}

The manifest is written last, so its presence means that every other file was written and synced. `seal`
makes it, `publish` makes the folder visible under its id by one rename, `verify` trusts nothing but the
manifest. What the files mean is `runner.train.state`'s; which is restored, `runner.checkpoint.local`'s.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runner.durable import disk, disk_error, sync, write_json
from runner.errors import DataError, JobError, Problem

MANIFEST = "checkpoint.json"
FORMAT = 1

_PIECE = 1 << 20
"""Bytes read at once; a checkpoint is never in memory whole."""


class FileRecord(BaseModel):
    """What one file of a checkpoint must be."""

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0)
    """Bytes."""
    sha256: str
    """Hexadecimal."""


class _Manifest(BaseModel):
    # Lenient to keys of the same format that a later version adds; a change of meaning is a new format.
    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=r"^\w[\w.-]*$")
    step: int = Field(ge=0)
    parent: str | None
    files: dict[str, FileRecord]
    extra: dict[str, Any] = {}


@dataclass(frozen=True)
class Sealed:
    """A checkpoint folder and what its manifest says."""

    folder: Path
    id: str
    step: int
    """Optimizer steps that are in it."""
    parent: str | None
    """The checkpoint that this one went on from; None for the first of a run."""
    extra: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    """By path inside the folder, `/` between parts."""
    manifest_sha256: str


def seal(folder: Path, *, id: str, step: int, parent: str | None, extra: Mapping[str, Any]) -> Sealed:
    """Sync every file of `folder`, then write its manifest.

    Raises:
        DataError: the folder holds something that is not a plain file, or is sealed already.
        StorageError, AccessDenied: the disk.
    """
    with disk(f"seal checkpoint {id}", folder):
        if (folder / MANIFEST).exists():
            raise DataError(f"seal checkpoint {id}: {folder} is sealed already; save into an empty folder")
        files = {}
        for name, path in _walk(folder):
            sync(path)
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        sync_folders(folder)
        head = {"format": FORMAT, "id": id, "step": step, "parent": parent}
        write_json(folder / MANIFEST, {**head, "files": files, "extra": dict(extra)})
    return read(folder)


def publish(folder: Path, outbox: Path, id: str) -> Path:
    """Move a sealed folder to `outbox/<id>` whole. Returns its new place.

    Raises:
        StorageError, AccessDenied: the disk, or something is already there.
    """
    target = outbox / id
    with disk(f"publish checkpoint {id}", outbox):
        move(folder, target)
    return target


def move(folder: Path, target: Path) -> None:
    """Rename a folder and make it last. `target` must not exist."""
    folder.rename(target)
    sync(target.parent)
    sync(folder.parent)


def sync_folders(folder: Path) -> None:
    """Make the names in a folder and all folders inside it last."""
    for root, _, _ in os.walk(folder, topdown=False):
        sync(Path(root))


def read(folder: Path) -> Sealed:
    """What the manifest of a folder says; its files are not looked at.

    Raises:
        DataError: no manifest, or one that cannot be read.
        JobError: the manifest is of a newer format.
    """
    name, path = folder.name, folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"checkpoint {name}: {MANIFEST} is missing, so it was never finished") from error
    except OSError as error:
        raise _unreadable(name, path, error) from error
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"checkpoint {name}: {MANIFEST} is not JSON: {error}") from error
    refuse_newer(document, f"checkpoint {name}")
    try:
        manifest = _Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"checkpoint {name}: {MANIFEST}: {place}: {first['msg']}") from error
    return Sealed(
        folder=folder,
        id=manifest.id,
        step=manifest.step,
        parent=manifest.parent,
        extra=manifest.extra,
        files=manifest.files,
        manifest_sha256=hashlib.sha256(content).hexdigest(),
    )


def verify(folder: Path) -> Sealed:
    """Compare every file with the manifest: none missing, none extra, size and SHA-256 equal.

    Raises:
        DataError: names the first file that is wrong, and how.
        JobError: the manifest is of a newer format.
        AccessDenied, StorageError: a file cannot be read; that says nothing about what is in it.
    """
    sealed = read(folder)
    name = folder.name
    with disk(f"read checkpoint {name}", folder):
        present = dict(_walk(folder))
    present.pop(MANIFEST, None)
    for missing in sorted(sealed.files.keys() - present.keys()):
        raise DataError(f"checkpoint {name}: {missing} is missing")
    for extra in sorted(present.keys() - sealed.files.keys()):
        raise DataError(f"checkpoint {name}: {extra} does not belong to it")
    for file, record in sorted(sealed.files.items()):
        path = present[file]
        try:
            size = path.stat().st_size
            if size != record.size:
                raise DataError(f"checkpoint {name}: {file} has {size} bytes, not {record.size}")
            digest = file_sha256(path)
        except OSError as error:
            raise _unreadable(name, path, error) from error
        if digest != record.sha256:
            raise DataError(f"checkpoint {name}: {file} has SHA-256 {digest}, not {record.sha256}")
    return sealed


def refuse_newer(document: Any, what: str) -> None:
    """Check the `format` of a JSON object that a run keeps.

    Raises:
        DataError: no object, or no format.
        JobError: a newer format; a guess at its meaning could destroy what it protects.
    """
    version = document.get("format") if isinstance(document, dict) else None
    if not isinstance(version, int) or version < 1:
        raise DataError(f"{what}: not an object with a format number")
    if version > FORMAT:
        reason = f"{what}: written in format {version}, and this version of the runner reads {FORMAT}"
        raise JobError([Problem("", reason, "use the version that wrote it, or a newer one")])


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _unreadable(name: str, path: Path, error: OSError) -> Exception:
    # EIO is a dead sector: this copy is lost and the checkpoint before it may be whole. Anything else, a
    # missing right above all, says nothing about the checkpoint.
    if error.errno == errno.EIO:
        return DataError(f"checkpoint {name}: {path.name} cannot be read: {error.strerror}")
    return disk_error(f"read checkpoint {name}", path, error)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Plain files under `folder` by relative name, in one order everywhere."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield name, path
        elif not stat.S_ISDIR(mode):
            raise DataError(f"checkpoint {folder.name}: {name} is a link or a device, not a plain file")
