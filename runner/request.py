"""What a supervisor asks of its trainer: one small file, replaced whole, read at every optimizer step.

    runs/<name>/attempts/<n>/request.json    {"format": 1, "action", "reason", "save_seconds", "saves"}

    action   the trainer
    go       trains; the same as no file
    wait     saves at the next step's end what is not saved yet, then does nothing until the file says another
    stop     saves at the next step's end and ends with 75; also out of a wait

    saves    whatever the action: each time that it is another number, it saves at the next step's end

One writer, any number of readers. Nothing here knows why somebody asks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from runner.durable import disk, write_json
from runner.errors import RunnerError

FILE = "request.json"

Action = Literal["go", "wait", "stop"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Request:
    """One request."""

    action: Action = "go"
    reason: str = ""
    """For people: SIGTERM, or how far the store is behind."""
    save_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Training time between two saves from now on; null leaves it as it is."""
    saves: Annotated[int, Field(ge=0)] = 0
    """How often this attempt was asked to save at once, beside all other saves."""
    format: Literal[1] = 1


GO = Request()

_READS = TypeAdapter(Request)


def write(attempt_dir: Path, request: Request) -> None:
    """Replace the request of an attempt.

    Raises:
        StorageError, AccessDenied: the disk.
    """
    path = attempt_dir / FILE
    with disk("write the request to the trainer", path):
        write_json(path, dataclasses.asdict(request))


class Reader:
    """The request of an attempt as it is now: one `stat` a look, parsed only when the file is another."""

    def __init__(self, attempt_dir: Path) -> None:
        self._path = attempt_dir / FILE
        self._seen: tuple[int, int, int] | None = None
        self._request = GO

    def now(self) -> Request:
        """What is asked; `GO` without a file.

        Raises:
            RunnerError: no request of ours.
            StorageError, AccessDenied: the disk.
        """
        with disk("read the supervisor's request", self._path):
            try:
                stat = self._path.stat()
                # A file that is replaced between the two is read early and once more at the next look.
                if (seen := (stat.st_ino, stat.st_mtime_ns, stat.st_size)) != self._seen:
                    self._request = self._parsed(self._path.read_bytes())
                    self._seen = seen
            except FileNotFoundError:
                self._request, self._seen = GO, None
        return self._request

    def _parsed(self, content: bytes) -> Request:
        try:
            return _READS.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RunnerError(
                f"read the supervisor's request {self._path}: {place or 'the file'}: {first['msg']}; the "
                "runner wrote it, so this is a defect of the runner; remedy: give the same command again, "
                "which goes on from the last checkpoint, and report that file"
            ) from error
