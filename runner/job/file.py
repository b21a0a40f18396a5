"""The text of a job file, from a path, a file: URL or an object in a bucket (s3://bucket/key)."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from runner.errors import AccessDenied, JobError, Problem
from runner.job.yaml_source import MAX_CHARACTERS

LARGEST = 4 * MAX_CHARACTERS
"""Bytes; UTF-8 needs at most four for a character."""

PATIENCE = 120.0
"""Seconds that a silent store is waited for: whoever waits has no GPU yet, or is a person."""


def read_job_file(name: str) -> str:
    """The text of the job file `name`.

    Raises:
        JobError: it cannot be read, is too large or is not UTF-8.
        AccessDenied: it may not be read.
        StorageError: the store does not answer.
    """
    if len(data := _bytes(name)) > LARGEST:
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


def _bytes(name: str) -> bytes:
    """The file, or the beginning of one that is too large."""
    if name.startswith("s3://"):
        return _from_bucket(name)
    try:
        with Path(_local(name)).open("rb") as file:
            return file.read(LARGEST + 1)
    except PermissionError as error:
        raise AccessDenied(
            f"read the job file {name}: {error.strerror}\n    remedy: chmod or chown it"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        remedy = "check the path; a folder or a bucket is not a job"
        raise JobError([Problem("", f"the job file cannot be read: {reason}", remedy, name)]) from error


def _from_bucket(name: str) -> bytes:
    bucket, _, key = name.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise JobError([Problem("", "this is not the address of an object", "write s3://bucket/key", name)])
    from runner.checkpoint.s3 import S3Store, Settings
    from runner.checkpoint.store import BootClock, Patience
    from runner.command import complain

    patience = Patience(PATIENCE, BootClock(), lambda event: complain(f"waiting: {event['message']}"))
    prefix, _, last = key.rpartition("/")
    store = S3Store(Settings(bucket, prefix), patience)
    try:
        data = store.beginning(last, LARGEST + 1)
    except JobError as error:  # of the bucket, and worded for checkpoints.uri
        reasons = [Problem("", problem.reason, problem.remedy, name) for problem in error.problems]
        raise JobError(reasons) from error
    finally:
        store.close()
    if data is None:
        remedy = "check the key; runner submit puts a job there before it needs it"
        raise JobError([Problem("", "there is no such object", remedy, name)])
    return data


def _local(name: str) -> str:
    url = urlsplit(name) if ":" in name else None
    if url is None or len(url.scheme) < 2:
        return name
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return unquote(url.path)
    reason = f"a job file from {url.scheme}:// is reserved for a later version"
    remedy = "name a path or s3://bucket/key, or put the text in JOB_YAML"
    raise JobError([Problem("", reason, remedy, name)])
