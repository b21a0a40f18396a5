"""A store in a folder, of this machine or of several: create-once and compare-and-swap by `link(2)`.

    <key>             written once, by a link to a file that is complete and synced
    <key>.<seq>       the versions of an object that is swapped; the highest number is the object

POSIX cannot compare and replace a file at once: reading, comparing and renaming loses swaps that it
reported. A link either creates a name or fails, so version n + 1 is made by whoever links it first. Old
versions are swept, so a writer that slept may still link a number that is free again; that number is not the
highest, and nobody reads it. A file system without hard links is refused, as a bucket without conditions is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.checkpoint.files import file_sha256
from runner.checkpoint.store import Missing, Object, Transient, unfit
from runner.durable import disk, sync
from runner.errors import DataError, StorageError

KEPT = 16
"""Versions of a swapped object that stay, for a writer that has to know whether it won."""

_SPARE = ".tmp"
"""Folder of files that are not complete yet. Of a killed writer they stay, and are never read."""

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


class FolderStore:
    """`runner.checkpoint.store.Store` in a folder.

    Args:
        root: the run's folder in the store; made when something is written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.place = str(root)

    def create(self, key: str, data: bytes) -> bool:
        path = self._root / key
        with disk(f"write {key} in the store", self._root):
            if self._link_new(path, lambda spare: spare.write_bytes(data)):
                return True
            return path.read_bytes() == data

    def create_file(self, key: str, path: Path, size: int, sha256: str) -> bool:
        target = self._root / key
        with disk(f"write {key} in the store", self._root):
            if self._link_new(target, lambda spare: shutil.copyfile(path, spare)):
                return True
            return target.stat().st_size == size and file_sha256(target) == sha256

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        with disk(f"write {key} in the store", self._root):
            newest = self._newest(key)
            held = None if newest is None else self._version(key, newest)
            if (None if held is None else held.etag) != etag:
                return None
            number = 1 if newest is None else newest + 1
            # The version before is named in the new one, so that one can tell whose successor it is.
            content = f"{etag}\n".encode() + data
            if not self._link_new(self._numbered(key, number), lambda spare: spare.write_bytes(content)):
                return None
            if self._newest(key) == number:
                self._sweep(key, number)
                return _etag(number, content)
            return self._overtaken(key, number, content)

    def read(self, key: str) -> Object | None:
        with disk(f"read {key} in the store", self._root):
            while (newest := self._newest(key)) is not None:
                if (held := self._version(key, newest)) is not None:
                    return held
            try:
                with (self._root / key).open("rb") as file:
                    data, age = file.read(), _age(file.fileno())
            except (FileNotFoundError, NotADirectoryError):
                return None
            return Object(data, _etag(0, data), age)

    def fetch(self, key: str, path: Path, size: int) -> str:
        source = self._root / key
        with disk(f"read {key} in the store", self._root):
            try:
                found = source.stat().st_size
                if found != size:
                    raise DataError(f"{source}: the file has {found} bytes, not {size}")
                shutil.copyfile(source, path)  # no link: what a run does to its copy stays its own
            except FileNotFoundError as error:
                if source.exists():
                    raise
                raise Missing(f"{source}: no such file") from error
            except OSError as error:
                if error.errno == errno.EIO:  # a dead sector: this copy is lost, another may be whole
                    raise DataError(f"{source}: cannot be read: {error.strerror}") from error
                raise
            return file_sha256(path)

    def keys(self, prefix: str) -> Iterator[str]:
        with disk(f"list {prefix} in the store", self._root):
            folder = self._root / prefix.rpartition("/")[0]
            names = {path.relative_to(self._root).as_posix() for path in folder.rglob("*") if path.is_file()}
        plain = {self._plain(name) for name in names if not name.startswith(f"{_SPARE}/")}
        yield from sorted(name for name in plain if name.startswith(prefix))

    def delete(self, key: str) -> None:
        with disk(f"delete {key} in the store", self._root):
            path = self._root / key
            found = [self._numbered(key, number) for number in self._numbers(key)]
            for one in (*found, path):
                one.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync(path.parent)

    def close(self) -> None:
        pass

    # --- names and versions ---

    def _numbered(self, key: str, number: int) -> Path:
        return self._root / f"{key}.{number:012d}"

    def _plain(self, name: str) -> str:
        """The key of a file: without the number, if it is a version."""
        stem, dot, number = name.rpartition(".")
        return stem if dot and len(number) == 12 and number.isdecimal() else name

    def _numbers(self, key: str) -> list[int]:
        """The versions of a key that are there, in order."""
        path = self._root / key
        if not path.parent.is_dir():
            return []
        names = [one.name for one in path.parent.iterdir() if one.name.startswith(f"{path.name}.")]
        return sorted(int(name[-12:]) for name in names if self._plain(name) == path.name)

    def _newest(self, key: str) -> int | None:
        return max(self._numbers(key), default=None)

    def _version(self, key: str, number: int) -> Object | None:
        """One version; None if it has been swept."""
        try:
            with self._numbered(key, number).open("rb") as file:
                content, age = file.read(), _age(file.fileno())
        except FileNotFoundError:
            return None
        return Object(content.partition(b"\n")[2], _etag(number, content), age)

    def _overtaken(self, key: str, number: int, content: bytes) -> str | None:
        """What became of a swap that is not the newest by now: it was the newest once, or never.

        Raises:
            Transient: the version after it has been swept, so nobody can tell.
        """
        try:
            after = self._numbered(key, number + 1).read_bytes()
        except FileNotFoundError as error:
            why = f"write {self.place}/{key}: version {number} was overtaken by many others"
            raise Transient(StorageError(f"{why}; remedy: give the same command again")) from error
        mine = _etag(number, content)
        return mine if after.partition(b"\n")[0].decode() == mine else None

    def _sweep(self, key: str, newest: int) -> None:
        for number in self._numbers(key):
            if number <= newest - KEPT:
                self._numbered(key, number).unlink(missing_ok=True)

    # --- the file system ---

    def _link_new(self, target: Path, write: Callable[[Path], object]) -> bool:
        """Make a file appear whole under a name that is free. False if it is taken."""
        target.parent.mkdir(parents=True, exist_ok=True)
        spares = self._root / _SPARE
        spares.mkdir(exist_ok=True)
        spare = spares / uuid.uuid4().hex
        try:
            write(spare)
            sync(spare)
            try:
                os.link(spare, target)
            except FileExistsError:
                return False
            except OSError as error:
                # Over NFS the answer of a link that was made can be lost; the count of links tells.
                if spare.stat().st_nlink != 2:
                    if error.errno in _NO_LINKS:
                        raise unfit(self.place, f"no hard links: {error.strerror}") from error
                    raise
            self._sync_up(target.parent)
            return True
        finally:
            spare.unlink(missing_ok=True)

    def _sync_up(self, folder: Path) -> None:
        """Make a name last, and the names of folders that may have been made for it."""
        for path in (folder, *folder.parents):
            sync(path)
            if path == self._root:
                sync(self._root.parent)
                return


def _age(file: int) -> float:
    """Seconds since a file was written; of a file server, as far as its clock goes with ours."""
    return max(0.0, time.time() - os.fstat(file).st_mtime)


def _etag(number: int, content: bytes) -> str:
    return f"{number}-{hashlib.sha256(content).hexdigest()}"
