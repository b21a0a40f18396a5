"""The checkpoints of a run on this machine: one `HEAD` that says what is committed, and a folder for each.

    runs/<name>/checkpoints/
        HEAD        {"format": 1, "head", "retained": [{"id", "step", "manifest_sha256"}], "bad", "sha256"}
        <id>/       a sealed checkpoint (`runner.checkpoint.files`)

A checkpoint is committed when `HEAD` names it, and `HEAD` is replaced by one rename. So every kill falls
on one side of a rename, and each side has an answer:

    killed                              HEAD says   what the next start finds and does
    before the folder is moved here     old         it is in the outbox: committed if it goes on from the head
    between the move and HEAD           old         a folder that HEAD does not name: to the outbox, as above
    between HEAD and the collection     new         folders that HEAD no longer names: deleted
    in the middle of a deletion         new         the rest of such a folder: deleted

What a folder scan finds is never restored: it is committed first, which needs every hash to be right and the
current head for a parent, or deleted. One process works here, the holder of the run's lock. The store of a
bucket has the same verbs and an owner besides.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from runner.checkpoint.files import Sealed, move, read, refuse_newer, verify
from runner.durable import disk, write_json
from runner.errors import DataError

HEAD = "HEAD"

_BAD_KEPT = 64
"""Ids remembered as bad, newest first. None of them can come back: ids are never used twice."""

START_OVER = "to start over from step 0, remove the run's whole folder"


class Entry(BaseModel):
    """A committed checkpoint."""

    model_config = ConfigDict(frozen=True)

    id: str
    step: int
    manifest_sha256: str
    """Of its checkpoint.json, which holds the hashes of all other files."""


class Head(BaseModel):
    """The state of the store."""

    model_config = ConfigDict(frozen=True)

    head: str | None = None
    """Id of the newest committed checkpoint."""
    retained: tuple[Entry, ...] = ()
    """Newest first; what a restore may use."""
    bad: tuple[str, ...] = ()
    """Ids that did not verify, newest first; never restored, never a parent."""


class LocalStore:
    """The store of one run.

    Args:
        folder: `runs/<name>/checkpoints`.
        keep_last: checkpoints that stay retained.
        say: takes events (`runner.events`) about what the store did.
    """

    def __init__(self, folder: Path, keep_last: int, say: Callable[[Mapping[str, Any]], None]) -> None:
        self._folder = folder
        self._keep_last = keep_last
        self._say = say
        self._head = Head()

    @property
    def newest(self) -> Entry | None:
        """The head."""
        return self._head.retained[0] if self._head.retained else None

    def open(self, fresh: bool) -> None:
        """Read `HEAD`, or create it for a run that is `fresh`: one that never had any.

        Raises:
            DataError: `HEAD` is missing where one was, or cannot be trusted.
        """
        path = self._folder / HEAD
        with disk("open the checkpoints", self._folder):
            self._folder.mkdir(exist_ok=True)
            if path.exists():
                self._head = _parse(path)
            elif fresh and not self._folders():
                self._swap(self._head)
            else:
                raise DataError(
                    f"open the checkpoints: {path} is missing, and it alone says which checkpoints are "
                    f"committed; remedy: put it back from a copy, or, {START_OVER}"
                )

    def recover(self, outbox: Path) -> None:
        """Commit or remove what a former attempt published and nobody committed."""
        with disk("recover the outbox", outbox):
            retained = {entry.id for entry in self._head.retained}
            for folder in self._folders():
                if folder.name not in retained:
                    move(folder, outbox / folder.name)
            # Ids sort by step, so that a child comes after its parent.
            for folder in sorted(outbox.iterdir()):
                reason = self._refusal(folder)
                if reason is None:
                    sealed = self.commit(folder)
                    self._say({"event": "commit", "id": sealed.id, "step": sealed.step, "leftover": True})
                else:
                    _remove(folder)
                    self._say({"event": "removed", "id": folder.name, "reason": reason})

    def commit(self, folder: Path) -> Sealed:
        """Take a published folder into the store. Committed when this returns, and not before.

        Raises:
            DataError: the folder does not verify; it stays where it is.
        """
        sealed = verify(folder)
        if sealed.id != folder.name:
            raise DataError(f"checkpoint {folder.name}: its manifest says that it is {sealed.id}")
        with disk(f"commit checkpoint {sealed.id}", self._folder):
            move(folder, self._folder / sealed.id)
            entry = Entry(id=sealed.id, step=sealed.step, manifest_sha256=sealed.manifest_sha256)
            retained = (entry, *self._head.retained)[: self._keep_last]
            self._swap(Head(head=entry.id, retained=retained, bad=self._head.bad))
        self._collect()
        return sealed

    def newest_valid(self) -> Sealed | None:
        """The checkpoint to restore: the newest that verifies. None for a run that has none yet.

        What does not verify leaves `retained` for `bad`, loudly.

        Raises:
            DataError: there are checkpoints and none is whole. `HEAD` stays as it was, for a disk that
                comes back.
        """
        bad: list[str] = []
        reasons: list[str] = []
        for position, entry in enumerate(self._head.retained):
            try:
                sealed = self._verified(entry)
            except DataError as error:
                bad.append(entry.id)
                reasons.append(str(error))
                continue
            if bad:
                with disk("set bad checkpoints aside", self._folder):
                    kept = (*bad, *self._head.bad)[:_BAD_KEPT]
                    self._swap(Head(head=sealed.id, retained=self._head.retained[position:], bad=kept))
                for name, reason in zip(bad, reasons, strict=True):
                    self._say({"event": "bad", "id": name, "reason": reason})
                text = f"{'; '.join(reasons)}. Going back to checkpoint {sealed.id}, step {sealed.step}"
                self._say({"event": "warning", "message": text})
            return sealed
        if not bad:
            return None
        raise DataError(
            f"restore: no checkpoint of this run is whole: {'; '.join(reasons)}; remedy: bring back "
            f"{self._folder} from a copy, or, {START_OVER}"
        )

    def _verified(self, entry: Entry) -> Sealed:
        sealed = verify(self._folder / entry.id)
        if sealed.manifest_sha256 != entry.manifest_sha256:
            raise DataError(f"checkpoint {entry.id}: its manifest is not the one that was committed")
        return sealed

    def _refusal(self, folder: Path) -> str | None:
        """Why a leftover is not committed; None when it is whole and goes on from the head."""
        if folder.name in self._head.bad:
            return "it did not verify before"
        try:
            parent = read(folder).parent
            if parent != self._head.head:
                head = self._head.head or "the start"
                return f"it goes on from {parent or 'the start'}, and the head is {head}"
            verify(folder)
        except DataError as error:
            return str(error)
        return None

    def _swap(self, head: Head) -> None:
        body = head.model_dump(mode="json")
        write_json(self._folder / HEAD, {"format": 1, **body, "sha256": _checksum(body)})
        self._head = head

    def _collect(self) -> None:
        """Delete what `HEAD` does not name any more. A failure costs space, not the run."""
        retained = {entry.id for entry in self._head.retained}
        for folder in self._folders():
            if folder.name not in retained:
                try:
                    _remove(folder)
                except OSError as error:
                    text = f"delete old checkpoint {folder.name}: {error.strerror}; it takes space until then"
                    self._say({"event": "warning", "message": text})

    def _folders(self) -> list[Path]:
        return [path for path in sorted(self._folder.iterdir()) if path.is_dir()]


def _parse(path: Path) -> Head:
    remedy = f"remedy: put it back from a copy, or, {START_OVER}"
    try:
        document = json.loads(path.read_bytes())
        refuse_newer(document, str(path))
        head = Head.model_validate(document)
    except DataError as error:
        raise DataError(f"{error}; {remedy}") from error
    except (ValueError, ValidationError) as error:
        raise DataError(f"{path}: cannot be read as the state of the checkpoints; {remedy}") from error
    if document.get("sha256") != _checksum(head.model_dump(mode="json")):
        raise DataError(f"{path}: its checksum does not fit its content; {remedy}")
    if head.head != (head.retained[0].id if head.retained else None):
        raise DataError(f"{path}: its head is not the newest of what it retains; {remedy}")
    return head


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
