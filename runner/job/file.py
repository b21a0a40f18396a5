"""The text of a job file, from a path or a file: URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from runner.errors import AccessDenied, JobError, Problem
from runner.job.yaml_source import MAX_CHARACTERS

LARGEST = 4 * MAX_CHARACTERS
"""Bytes; UTF-8 needs at most four for a character."""


def read_job_file(name: str) -> str:
    """The text of the job file `name`.

    Raises:
        JobError: it cannot be read, is too large or is not UTF-8.
        AccessDenied: it may not be read.
    """
    try:
        with Path(_local(name)).open("rb") as file:
            data = file.read(LARGEST + 1)
    except PermissionError as error:
        raise AccessDenied(
            f"read the job file {name}: {error.strerror}\n    remedy: chmod or chown it"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        remedy = "check the path; a folder or a bucket is not a job"
        raise JobError([Problem("", f"the job file cannot be read: {reason}", remedy, name)]) from error
    if len(data) > LARGEST:
        reason = f"the file is larger than {LARGEST:,} bytes"
        raise JobError([Problem("", reason, "name the job file, not a data file", name)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise JobError(
            [Problem("", "the file is not UTF-8 text", "save it as UTF-8", f"{name}:{line}:{column}")]
        ) from error


def _local(name: str) -> str:
    url = urlsplit(name) if ":" in name else None
    if url is None or len(url.scheme) < 2:
        return name
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return unquote(url.path)
    reason = f"a job file from {url.scheme}:// is reserved for a later version"
    remedy = "mount or copy the file, or put its text in JOB_YAML"
    raise JobError([Problem("", reason, remedy, name)])
