"""A disk that loses power: what of a folder is still there when everything that was not synced is dropped.

    with Recorder(folder) as recorder:
        ...                          # code that writes, links, renames and syncs in the folder
        recorder.acknowledge(...)    # what somebody was promised by now
    recorder.moments                 # before every operation: what the disk might show after a loss of power

fsync of a file makes its content last, fsync of a folder the names in it; nothing else lasts for certain, and
everything may. So a folder shows either the names of its last fsync or those of now, each folder for itself,
and a file the content of its last fsync, or nothing. A kill of a process loses none of this: that is why no
kill can show a missing fsync.

Operations are seen by Python's audit events, which come before them; `os.fsync` is replaced.
"""

from __future__ import annotations

import linecache
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

import pytest

_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

Names = dict[int, dict[str, int]]
"""Of every folder: its names, and their inodes."""

State = Mapping[str, bytes]
"""Files by path in the folder."""

Site = tuple[str, str]
"""A call: the function that it stands in, and its line as it is written."""


@dataclass(frozen=True)
class Moment:
    """A point in time at which the power may go."""

    names: Names
    """As the process sees them."""
    lasting_names: Names
    """As they were synced."""
    lasting: dict[int, bytes]
    """Contents of files as they were synced."""
    acknowledged: int
    """How much had been promised."""
    root: int

    def states(self) -> Iterator[State]:
        """What the disk may show: all names of now or all that last, and with each folder the other way."""
        folders = sorted({*self.names, *self.lasting_names})
        for now in (True, False):
            yield self._shown(dict.fromkeys(folders, now))
            for one in folders:
                yield self._shown({**dict.fromkeys(folders, now), one: not now})

    def _shown(self, now: Mapping[int, bool]) -> State:
        found: dict[str, bytes] = {}

        def walk(folder: int, path: str) -> None:
            names = (self.names if now.get(folder, False) else self.lasting_names).get(folder, {})
            for name, inode in names.items():
                if inode in self.names or inode in self.lasting_names:
                    walk(inode, f"{path}{name}/")
                else:
                    found[path + name] = self.lasting.get(inode, b"")

        walk(self.root, "")
        return found


@dataclass
class Recorder:
    """Watches what this process does in one folder. One at a time."""

    folder: Path
    ignored: Site | None = None
    """A call of fsync that does nothing, as if somebody had forgotten it."""
    moments: list[Moment] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    """Who called fsync."""
    acknowledgements: list[Any] = field(default_factory=list)
    _names: Names = field(default_factory=dict)
    _lasting_names: Names = field(default_factory=dict)
    _lasting: dict[int, bytes] = field(default_factory=dict)
    _held: dict[int, int] = field(default_factory=dict)
    """Open files, by inode: so that no inode has a second life."""
    _lock: Any = field(default_factory=threading.RLock)
    _busy: bool = False

    _current: ClassVar[Recorder | None] = None
    _hooked: ClassVar[bool] = False

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(os, "fsync", self._fsync)
        self._look()
        self._lasting_names = dict(self._names)  # the folder itself, and what was there before
        if not Recorder._hooked:
            sys.addaudithook(_hook)  # there is no way to take one away again
            Recorder._hooked = True
        Recorder._current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Recorder._current = None
        self._patch.undo()
        self._mark()
        for handle in self._held.values():
            os.close(handle)

    def acknowledge(self, promise: Any) -> None:
        """From now on this must survive."""
        with self._lock:
            self.acknowledgements.append(promise)
            self._mark()

    def made(self, folder: Path) -> None:
        """The names in a folder are taken to last: who made them is not what is tested."""
        self._look()
        inode = folder.stat().st_ino
        self._lasting_names[inode] = dict(self._names[inode])

    def seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An operation is about to happen."""
        if event in _CHANGES or (event == "open" and _writes(arguments)):
            with self._lock:
                if not self._busy:
                    self._mark()

    def _mark(self) -> None:
        self._look()
        acknowledged = len(self.acknowledgements)
        root = self.folder.stat().st_ino
        self.moments.append(
            Moment(self._names, dict(self._lasting_names), dict(self._lasting), acknowledged, root)
        )

    def _look(self) -> None:
        """Read all names as they are."""
        self._busy = True
        try:
            self._names = {}
            for path, _, _ in os.walk(self.folder):
                with os.scandir(path) as entries:
                    here = {entry.name: entry.inode() for entry in entries}
                self._names[os.stat(path).st_ino] = here  # noqa: PTH116
                for name, inode in here.items():
                    if inode not in self._held:
                        self._held[inode] = os.open(f"{path}/{name}", os.O_RDONLY)
        finally:
            self._busy = False

    def _fsync(self, handle: int) -> None:
        site = _site(sys._getframe(1))
        with self._lock:
            self._synced(site, handle)

    def _synced(self, site: Site, handle: int) -> None:
        self.sites.append(site)
        self._mark()
        if site == self.ignored:
            return
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            self._lasting_names[found.st_ino] = dict(self._names.get(found.st_ino, {}))
        else:
            self._busy = True
            self._lasting[found.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()
            self._busy = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    recorder = Recorder._current
    if recorder is not None:
        recorder.seen(event, arguments)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _site(frame: FrameType | None) -> Site:
    """Who wants something synced: the caller of fsync, or of `runner.durable.sync`."""
    assert frame is not None
    if frame.f_code.co_name == "sync":
        frame = frame.f_back
        assert frame is not None
    code = frame.f_code
    return code.co_qualname, linecache.getline(code.co_filename, frame.f_lineno).strip()
