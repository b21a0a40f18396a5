"""Reads a run while it is killed, as a stranger may: `HEAD`, and every byte that it retains.

    with Observer(port_of_the_store) as observer:
        observer.watch(bucket, prefix)
        ...
        report = observer.leave(bucket)

It asks the store itself, in a process of its own, and asserts what a reader may rely on: `HEAD` goes forward,
and what it retains is there whole. Something that is collected while it is read is fine only when the `HEAD`
that is read afterwards does not retain it (CHECKPOINTS.md, Restore 2).
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from runner.checkpoint.head import Entry, Head, Manifest, decode
from runner.errors import DataError
from tests.chaos.bucket import Bucket
from tests.chaos.nursery import die_with

PAUSE = 0.03
"""Seconds between two looks."""

AGAIN = 0.7
"""Seconds after which what has not changed is verified once more."""


@dataclass
class Report:
    """What was seen of one run."""

    looks: int = 0
    verified: int = 0
    """Checkpoints that were read whole."""
    collected: int = 0
    """Checkpoints that went away while they were read."""
    violations: list[str] = field(default_factory=list)


@dataclass
class Watched:
    """One run under observation."""

    bucket: Bucket
    prefix: str
    """Of the run, with a slash at the end."""
    head: Head | None = None
    verified_at: float = 0.0
    report: Report = field(default_factory=Report)

    def look(self, at_once: bool = False) -> None:
        """Read HEAD, and verify what it retains when it has changed or the last time was long ago."""
        self.report.looks += 1
        found = self._read_head()
        if found is None:
            return
        before, self.head = self.head, found
        self.report.violations += forward(before, found)
        entries = [*found.retained, *([found.final] if found.final is not None else [])]
        known = [] if before is None else [*before.retained, before.final]
        now = time.monotonic()
        if at_once or now - self.verified_at > AGAIN or any(entry not in known for entry in entries):
            self.verified_at = now
            for entry in entries:
                self._verify(entry)

    def _read_head(self) -> Head | None:
        data = self.bucket.read(f"{self.prefix}HEAD")
        if data is None:
            if self.head is not None:
                self.report.violations.append("HEAD has vanished")
            return None
        try:
            return decode(Head, data, "HEAD")
        except DataError as error:
            self.report.violations.append(f"HEAD cannot be read: {error}")
            return None

    def _verify(self, entry: Entry) -> None:
        for problem in problems(self.bucket, self.prefix, entry):
            # Only now: what was collected meanwhile is not in a HEAD that is read afterwards.
            data = self.bucket.read(f"{self.prefix}HEAD")
            head = None if data is None else decode(Head, data, "HEAD")
            if head is not None and entry not in (*head.retained, head.final):
                self.report.collected += 1
                return
            self.report.violations.append(f"retained checkpoint {entry.id}: {problem}")
        self.report.verified += 1


def forward(before: Head | None, after: Head) -> list[str]:
    """What is wrong with a later HEAD; nothing ever goes back within these runs."""
    if before is None:
        return []
    old, new = before.newest, after.newest
    wrong = {
        f"seq {before.seq} -> {after.seq}": after.seq < before.seq,
        f"seq {after.seq} has two contents": after.seq == before.seq and after != before,
        f"epoch {before.epoch} -> {after.epoch}": after.epoch < before.epoch,
        "the head checkpoint is gone": old is not None and new is None,
        f"step {old and old.step} -> {new and new.step}": bool(old and new and new.step < old.step),
        f"done -> {after.state}": before.state == "done" and after.state != "done",
        "done is done with something else": before.state == "done"
        and (before.final, before.retained) != (after.final, after.retained),
    }
    return [f"HEAD went back: {what}" for what, is_so in wrong.items() if is_so]


def problems(bucket: Bucket, prefix: str, entry: Entry) -> Iterator[str]:
    """What is wrong with a retained checkpoint, read whole."""
    data = bucket.read(prefix + entry.key)
    if data is None:
        yield f"{entry.key} is missing"
        return
    if hashlib.sha256(data).hexdigest() != entry.manifest_sha256:
        yield f"{entry.key} is another manifest"
        return
    for name, blob in decode(Manifest, data, entry.key).files.items():
        content = bucket.read(prefix + blob.key)
        if content is None:
            yield f"{name}, {blob.key}, is missing"
        elif (len(content), hashlib.sha256(content).hexdigest()) != (blob.size, blob.sha256):
            yield f"{name}, {blob.key}, has another content"


class Observer:
    """The process, seen from the one that asks. Begin it before any thread."""

    def __init__(self, port: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _serve(theirs, port)
        theirs.close()
        self._socket = ours
        self._lock = threading.Lock()
        self._file = ours.makefile("rw", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._socket.close()
        os.waitpid(self._pid, 0)

    def watch(self, bucket: str, prefix: str) -> None:
        """Look at a run from now on."""
        self._ask("watch", bucket, prefix)

    def leave(self, bucket: str) -> Report:
        """Look a last time, and tell."""
        return Report(**self._ask("leave", bucket, ""))

    def _ask(self, *what: str) -> dict[str, Any]:
        with self._lock:
            self._file.write(json.dumps(what) + "\n")
            self._file.flush()
            answer: dict[str, Any] = json.loads(self._file.readline())
        return answer


def _serve(connection: socket.socket, port: int) -> None:
    try:
        die_with(os.getppid())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        file = connection.makefile("rw", encoding="utf-8")
        watched: dict[str, Watched] = {}
        while True:
            ready, _, _ = select.select([connection], [], [], PAUSE)
            if ready:
                line = file.readline()
                if not line:
                    break
                what, bucket, prefix = json.loads(line)
                answer: dict[str, Any] = {}
                if what == "watch":
                    watched[bucket] = Watched(Bucket(port, bucket), prefix)
                else:
                    one = watched.pop(bucket)
                    one.look(at_once=True)
                    one.bucket.close()
                    answer = vars(one.report)
                file.write(json.dumps(answer) + "\n")
                file.flush()
            for one in watched.values():
                one.look()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(0)
