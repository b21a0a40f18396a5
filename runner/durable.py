"""Files that survive a kill: written whole and synced, and a failing disk named for what it is.

`disk` is the one place where an `OSError` of our own files becomes an exit code. Nothing here knows what a
run or a checkpoint is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import AccessDenied, RunnerError, StorageError

_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk(operation: str, path: Path) -> Iterator[None]:
    """Map the `OSError` of a block: `with disk("write the checkpoint", folder): ...`

    EACCES, EPERM, EROFS    AccessDenied 77
    ENOSPC, EDQUOT          StorageError 74, names the free space
    any other               StorageError 74
    """
    try:
        yield
    except OSError as error:
        raise disk_error(operation, path, error) from error


@contextlib.contextmanager
def scratch(operation: str) -> Iterator[Path]:
    """A folder among the temporary files, and gone afterwards."""
    with (
        disk(operation, Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="runner-") as folder,
    ):
        yield Path(folder)


def disk_error(operation: str, path: Path, error: OSError) -> RunnerError:
    """The exception that `disk` raises."""
    place = error.filename or path
    why = error.strerror or str(error)
    if error.errno in _NO_RIGHT:
        return AccessDenied(
            f"{operation}: {place}: {why}; remedy: give this user the right to write there, "
            "or start where it may write"
        )
    if error.errno in _NO_SPACE:
        return StorageError(
            f"{operation}: {place}: {why}; remedy: free space there and give the same command again; "
            "it goes on from the last checkpoint"
        )
    return StorageError(f"{operation}: {place}: {why}; remedy: check the disk and repeat the command")


def write_text(path: Path, text: str) -> None:
    """Replace a file: a reader, or a start after a kill, sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON, indented for people, one newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """fsync a file or a folder; for a folder that makes its renames and creations last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
