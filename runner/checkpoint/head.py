"""What a run's store holds besides blobs: `HEAD` and the manifests of checkpoints, as data, and their keys.

    HEAD                                     who owns the run, and which checkpoints count; swapped
    checkpoints/<step>-<epoch>-<id>.json     a checkpoint: names to blobs; written once, after all its blobs
    blobs/<epoch>/<sha256>                   the content of a file; written once
    pins/<reader>-<n>.json                   keeps a checkpoint from collection while it is read
    events/<epoch>-<n>.jsonl                 what happened, in parts; written once
    run.json                                 what makes the run this run; written once, not ours

The epoch is the number of the owner that wrote a thing, from 1. It stands in the key of every blob, so that
an owner never relies on, and never loses, what an owner before it left half done. Nothing here calls a store.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from runner.checkpoint.files import FORMAT, FileRecord, refuse_newer
from runner.errors import DataError

HEAD = "HEAD"
MANIFESTS = "checkpoints/"
BLOBS = "blobs/"
PINS = "pins/"
EVENTS = "events/"
IDENTITY = "run.json"

FINAL = "final"
"""Id of what a run ends with, which no checkpoint has."""

TRAINED = "trained_step"
"""In its `extra`: the step whose parameters it holds, which may be the best and not the last."""

TTL = 60.0
"""Seconds after which an owner that does not renew may be replaced."""

RENEW_EVERY = 15.0

RETAINED = 64
"""Most checkpoints in `HEAD`, which is read and written whole."""

_BAD_KEPT = 64

_EPOCH = re.compile(r"(?:blobs/|checkpoints/[0-9]+-)([0-9]+)[/-]")

_RELATIVE = r"^[^./][^/]*(/[^./][^/]*)*$"
"""A key without a part that leads out of the store."""

_LONGEST_NAME = 255
"""Bytes of a file's name, on every file system of Linux and macOS."""

M = TypeVar("M", bound=BaseModel)


class Owner(BaseModel):
    """Who works on a run."""

    model_config = ConfigDict(frozen=True)

    attempt: str
    """Of this process alone."""
    host: str
    """For messages; nothing is decided by it."""
    job: str | None = None
    """The orchestrator's own id of the job that this process belongs to."""
    lock: str | None = None
    """Boot, device and inode of the lock file that the owner holds while it lives; None where it has none."""


class Entry(BaseModel):
    """A committed checkpoint."""

    model_config = ConfigDict(frozen=True)

    id: str
    step: int
    key: str = Field(pattern=_RELATIVE)
    """Of its manifest."""
    manifest_sha256: str


class Head(BaseModel):
    """The state of a run."""

    model_config = ConfigDict(frozen=True)

    state: Literal["held", "released", "done", "removing"]
    """`removing`: held by whoever deletes the run; half of it may be gone, and nobody else goes on."""
    epoch: int = Field(ge=1)
    owner: Owner
    seq: int = Field(ge=1)
    """Counts the swaps."""
    nonce: str
    """Of the swap that wrote this, so that its writer knows it again."""
    ttl_s: float
    retained: tuple[Entry, ...] = ()
    """Newest first; what a restore may use."""
    bad: tuple[str, ...] = ()
    """Manifest keys that did not verify, newest first; never restored, never a source of blobs."""
    final: Entry | None = None
    """The adapter and the metrics of the end, written as a checkpoint is; there when the state is done."""
    geometry: dict[str, Any] = {}
    """How the global batch was cut when it last fitted."""
    memory_peak: float | None = None
    """The most that this owner's trainer had of the memory limit, as a share; None where nobody knows."""
    record: dict[str, Any] = {}
    """What the run has cost so far: attempts, seconds, restarts, metrics (`runner.supervisor.result`)."""
    events: str | None = None
    """Key of the newest part of the run's events."""

    @property
    def needed(self) -> tuple[Entry, ...]:
        """What stays: the retained checkpoints, newest first, and the end."""
        return self.retained if self.final is None else (*self.retained, self.final)

    @property
    def newest(self) -> Entry | None:
        """The head checkpoint."""
        return self.retained[0] if self.retained else None


class Blob(FileRecord):
    """One file of a checkpoint. What is garbage is deleted by its key, so that leads nowhere else."""

    key: str = Field(pattern=_RELATIVE)


class Manifest(BaseModel):
    """The content of a manifest: everything that restores one checkpoint."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=r"^\w[\w.-]*$")
    step: int = Field(ge=0)
    epoch: int = Field(ge=1)
    parent: str | None
    files: dict[str, Blob]
    """By path inside the checkpoint, its checkpoint.json among them."""
    extra: dict[str, Any] = {}

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, Blob]) -> dict[str, Blob]:
        for name in files:
            path = PurePosixPath(name)
            if name != path.as_posix() or path.is_absolute() or not path.parts or ".." in path.parts:
                raise ValueError(f"{name!r} would lie outside the checkpoint")
            if not name.isprintable() or max(len(part.encode()) for part in path.parts) > _LONGEST_NAME:
                raise ValueError(f"{name!r} is no name of a file")
            if any(parent.as_posix() in files for parent in path.parents):
                raise ValueError(f"{name!r} would lie inside a file")
        return files


class Pin(BaseModel):
    """A reader's wish."""

    model_config = ConfigDict(frozen=True)

    entry: Entry
    """What it reads."""
    ttl_s: float
    """It ends this long after its last change."""


def manifest_key(step: int, epoch: int, id: str) -> str:
    """Where the manifest of a checkpoint lies; sorts by step."""
    return f"{MANIFESTS}{step:08d}-{epoch:06d}-{id}.json"


def blob_key(epoch: int, sha256: str, copy: int) -> str:
    """Where a content lies. A second copy is for one whose first key is spoilt or deleted."""
    return f"{BLOBS}{epoch:06d}/{sha256}{f'-{copy}' if copy else ''}"


def epoch_of(key: str) -> int:
    """The epoch in the key of a blob or a manifest; of any other key one above all: nobody deletes it."""
    found = _EPOCH.match(key)
    return sys.maxsize if found is None else int(found[1])


def is_manifest(key: str) -> bool:
    """Whether a key is one that `manifest_key` makes."""
    return re.fullmatch(rf"{MANIFESTS}\d+-\d+-[^/]+\.json", key) is not None


def is_blob(key: str) -> bool:
    """Whether a key is one that `blob_key` makes."""
    return re.fullmatch(rf"{BLOBS}\d+/[0-9a-f]{{64}}(-\d+)?", key) is not None


def step_of(key: str) -> int:
    """The step in the key of a manifest."""
    return int(key.removeprefix(MANIFESTS).split("-")[0])


def successor(head: Head, **changes: Any) -> Head:
    """The next state: `head` with changes, a new number and a new nonce."""
    return head.model_copy(update={**changes, "seq": head.seq + 1, "nonce": uuid.uuid4().hex})


def committed(retained: Iterable[Entry], entry: Entry, keep_last: int) -> tuple[Entry, ...]:
    """`retained` after a commit: the newest `keep_last`, at most `RETAINED`."""
    return (entry, *retained)[: min(keep_last, RETAINED)]


def without_bad(head: Head, bad: Collection[str]) -> dict[str, Any]:
    """The changes that take checkpoints, by manifest key, out of what counts."""
    return {
        "retained": tuple(entry for entry in head.retained if entry.key not in bad),
        "bad": (*bad, *head.bad)[:_BAD_KEPT],
    }


def encode(value: BaseModel) -> bytes:
    """JSON with the format and a checksum of itself."""
    body = value.model_dump(mode="json")
    return json.dumps({"format": FORMAT, **body, "sha256": _checksum(body)}, indent=1).encode()


def decode(kind: type[M], data: bytes, what: str) -> M:
    """What `encode` made.

    Args:
        what: for messages, where it was read.

    Raises:
        DataError: it is damaged, or something else.
        JobError: of a newer format.
    """
    try:
        document: Any = json.loads(data)
        refuse_newer(document, what)
        value = kind.model_validate(document)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: cannot be read as a {kind.__name__.lower()}") from error
    body = {name: field for name, field in document.items() if name not in ("format", "sha256")}
    if document.get("sha256") != _checksum(body):
        raise DataError(f"{what}: its checksum does not fit its content")
    return value


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
