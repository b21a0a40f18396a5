"""Where checkpoints lie, from an address to a store.

s3://bucket/prefix         `runner.checkpoint.s3`
file:///folder  /folder    `runner.checkpoint.folder`; ./folder and ~/folder count from here and home
anything else              refused: there is no seam to it
"""

from __future__ import annotations

import re
from pathlib import Path

from runner.checkpoint.folder import FolderStore
from runner.checkpoint.store import Patience, Store
from runner.errors import JobError, Problem

_REMEDY = "write s3://bucket/prefix (for another vendor's S3 set AWS_ENDPOINT_URL), or a folder"


def run_place(uri: str | None, name: str, run_folder: Path) -> str:
    """Address of a run's place in a store.

    Args:
        uri: `checkpoints.uri` of its job.
        run_folder: where it keeps its checkpoints without one.
    """
    return str(run_folder / "checkpoints") if uri is None else f"{uri.rstrip('/')}/{name}"


def open_store(
    place: str,
    patience: Patience,
    *,
    fenced: bool = True,
    kms_key: str | None = None,
    bucket_owner: str | None = None,
    of_runs: bool = False,
) -> Store:
    """The store of one run. Nothing is asked of it yet.

    Args:
        place: address of the run.
        of_runs: it is the parent of runs instead, which may be a whole bucket.
        fenced: False for a bucket without conditional writes.

    Raises:
        JobError: an address that leads nowhere.
    """
    scheme, slashes, rest = place.partition("://")
    if not slashes:
        return FolderStore(Path(place).expanduser().absolute())
    if scheme == "file":
        if not rest.startswith("/"):
            raise _unknown(place, "a file address has three slashes and an absolute path")
        return FolderStore(Path(rest))
    if scheme != "s3":
        raise _unknown(place, f"{scheme}:// is not spoken here")
    bucket, _, prefix = rest.strip("/").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or not (prefix or of_runs):
        raise _unknown(place, "it must name a bucket (3 to 63 of a-z 0-9 . -) and a run in it")
    from runner.checkpoint.s3 import S3Store, Settings

    settings = Settings(bucket=bucket, prefix=prefix, kms_key=kms_key, owner=bucket_owner, fenced=fenced)
    return S3Store(settings, patience)


def _unknown(place: str, why: str) -> JobError:
    return JobError([Problem("checkpoints.uri", f"{place!r}: {why}", _REMEDY)])
