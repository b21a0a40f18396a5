"""A store in a bucket: boto3 with real conditions, and nothing in memory that belongs in a file.

Endpoint, region, credentials, CA bundle and proxies are boto3's own: `AWS_ENDPOINT_URL`, profiles and roles,
`AWS_CA_BUNDLE`, `HTTPS_PROXY`; `AWS_REGION` goes before them. botocore's retries are off, because a repeated
conditional write must be recognised by whoever sent the first; `Patience` repeats here. Every body carries a
checksum that the server compares: SHA-256, or for parts CRC-32, the one that S3 keeps for a whole multi-part
object and that Python computes without a package of Amazon's.

Files above `WHOLE` travel in parts (`runner.checkpoint.s3_parts`). What an error answer means is
`runner.checkpoint.s3_errors`'s.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from runner import aws
from runner.checkpoint.s3_errors import Meaning, answered, silent
from runner.checkpoint.s3_parts import Parts, Slice, cut, finish
from runner.checkpoint.store import Missing, Object, Patience, Transient
from runner.durable import disk
from runner.errors import AccessDenied, DataError, JobError, Problem

WHOLE = 64 << 20
"""Bytes of the largest file that is sent in one request."""

PART = 16 << 20
"""Bytes of a part, and of a range that is read at once."""

THREADS = 8

_PIECE = 120 << 10
"""Bytes that one thread has of an answer. From 128 KiB on malloc maps memory for each piece and gives it
back, which several threads pay for more dearly than for the copy."""


@dataclass(frozen=True)
class Settings:
    """Where a run lies in a bucket, and what a bucket may ask for."""

    bucket: str
    prefix: str
    """Without a slash at the end; empty for the bucket itself."""
    kms_key: str | None = None
    """Key id for SSE-KMS; None: as the bucket encrypts by default."""
    owner: str | None = None
    """Account that must own the bucket; None: not checked."""
    fenced: bool = True
    """Send conditions. False for a store that has none: it is read before it is written, and that is all."""
    whole: int = WHOLE
    part: int = PART


class S3Store:
    """`runner.checkpoint.store.Store` in a bucket."""

    def __init__(self, settings: Settings, patience: Patience) -> None:
        self._at = settings
        self._patience = patience
        self._owner = {} if settings.owner is None else {"ExpectedBucketOwner": settings.owner}
        self._sse: dict[str, Any] = (
            {}
            if settings.kms_key is None
            else {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": settings.kms_key}
        )
        self._clients = _Clients()
        self._worked: set[str] = set()
        """Operations that were answered: a right to read says nothing about one to write."""
        self._pool = ThreadPoolExecutor(THREADS, "s3")
        """Sends parts and reads ranges; what is in memory at once does not grow with the files."""
        self.place = f"s3://{settings.bucket}/{settings.prefix}".rstrip("/")

    def create(self, key: str, data: bytes) -> bool:
        sha256 = hashlib.sha256(data)
        if not self._at.fenced and (held := self.read(key)) is not None:
            return held.data == data
        sent = self._patience.run(lambda: self._put(key, data, sha256.digest(), {"IfNoneMatch": "*"}))
        if sent is not None:
            return True
        held = self.read(key)
        return held is not None and held.data == data

    def create_file(self, key: str, path: Path, size: int, sha256: str) -> bool:
        if not self._at.fenced and self._patience.run(lambda: self._head(key)) is not None:
            return self._holds(key, size, sha256)
        if size > self._at.whole:
            return self._create_large(key, path, size, sha256)
        digest = bytes.fromhex(sha256)
        with disk("send a checkpoint", path), Slice(path, 0, size) as body:
            sent = self._patience.run(lambda: self._put(key, body, digest, {"IfNoneMatch": "*"}))
        return sent is not None or self._holds(key, size, sha256)

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        digest = hashlib.sha256(data).digest()
        if not self._at.fenced:
            held = self._read(key)
            if (None if held is None else held.etag) != etag:
                return None
        try:
            return self._put(key, data, digest, {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag})
        except Missing:  # If-Match on a key that is gone
            return None

    def read(self, key: str) -> Object | None:
        return self._patience.run(lambda: self._read(key))

    def beginning(self, key: str, most: int) -> bytes | None:
        """So many bytes of an object at most, None if there is none."""

        def read(answer: Any, body: Any) -> bytes:
            del answer
            data = b""
            # To its end: only there is an answer that was cut found out.
            while len(data) < most and (piece := body.read(most - len(data))):
                data += piece
            return data

        try:
            data: bytes = self._patience.run(lambda: self._get(key, read))
        except Missing:
            return None
        return data

    def fetch(self, key: str, path: Path, size: int) -> str:
        digest = hashlib.sha256()
        with disk("restore a checkpoint", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                ranges = cut(size, self._at.part)
                calls = (self._range_call(key, handle, start, length, size) for start, length in ranges)
                jobs = [self._pool.submit(self._unless_ended, call) for call in calls]
                try:
                    buffer = memoryview(bytearray(_PIECE))
                    for job, (start, length) in zip(jobs, ranges, strict=True):
                        job.result()
                        for at in range(start, start + length, _PIECE):
                            count = os.preadv(handle, [buffer[: start + length - at]], at)
                            digest.update(buffer[:count])
                finally:
                    finish(jobs)
            finally:
                os.close(handle)
        return digest.hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        token: dict[str, Any] = {}
        while True:
            query: dict[str, Any] = {"Prefix": self._key(prefix), **token}
            page = self._patience.run(partial(self._call, "ListObjectsV2", prefix, **query))
            for entry in page.get("Contents", []):
                yield entry["Key"][len(self._key("")) :]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def folders(self) -> Iterator[str]:
        """What keys begin with, up to their first slash: of the parent of runs, the runs. In order."""
        token: dict[str, Any] = {}
        while True:
            query: dict[str, Any] = {"Prefix": self._key(""), "Delimiter": "/", **token}
            page = self._patience.run(partial(self._call, "ListObjectsV2", "", **query))
            for entry in page.get("CommonPrefixes", []):
                yield entry["Prefix"][len(self._key("")) : -1]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def below(self, name: str) -> Self:
        """A run below this place, through the same connections, which stay this store's to close. What was
        answered here says nothing about the rights there."""
        run = copy.copy(self)
        run._at = replace(self._at, prefix=self._key(name))
        run._worked = set()
        run.place = f"{self.place}/{name}"
        return run

    def extent(self, prefix: str) -> tuple[int, bool]:
        """Bytes of the first thousand objects whose keys begin so, and whether those are all: one request."""
        query: dict[str, Any] = {"Prefix": self._key(prefix)}
        page = self._patience.run(partial(self._call, "ListObjectsV2", prefix, **query))
        return sum(entry["Size"] for entry in page.get("Contents", [])), not page.get("IsTruncated")

    def delete(self, key: str) -> None:
        self._patience.run(lambda: self._call("DeleteObject", key, Key=self._key(key)))

    def close(self) -> None:
        self._pool.shutdown()
        self._clients.close()

    def _unless_ended(self, call: Callable[[], None]) -> None:
        """A part of a file; none is begun once a notice has ended the waiting for the whole."""
        self._patience.check()
        self._patience.run(call)

    # --- one request each ---

    def _put(self, key: str, body: Any, sha256: bytes, condition: dict[str, Any]) -> str | None:
        """The new etag; None when the condition does not hold."""
        checksum = base64.b64encode(sha256).decode()
        try:
            answer = self._call(
                "PutObject",
                key,
                Key=self._key(key),
                Body=body,
                ChecksumSHA256=checksum,
                **(condition if self._at.fenced else {}),
                **self._sse,
            )
        except _Lost:
            return None
        return str(answer["ETag"])

    def _read(self, key: str) -> Object | None:
        try:
            answer = self._get(key, _content)
        except Missing:
            return None
        return Object(*answer)

    def _range_call(self, key: str, handle: int, start: int, length: int, size: int) -> Callable[[], None]:
        def write(answer: Any, body: Any) -> None:
            # Of a store that does not know ranges, all that it sends.
            total = answer.get("ContentRange", f"/{answer['ContentLength']}").rpartition("/")[2]
            if int(total) != size:
                raise DataError(f"{self.place}/{key}: the object has {total} bytes, not {size}")
            at = start
            while piece := body.read(_PIECE):
                os.pwrite(handle, piece, at)
                at += len(piece)
            if at - start != length:
                raise Transient(silent(f"GetObject {self.place}/{key}: the answer ended early"))

        span = {"Range": f"bytes={start}-{start + length - 1}"} if length else {}
        return lambda: self._get(key, write, **span)

    def _get(self, key: str, use: Callable[[Any, Any], Any], **fields: Any) -> Any:
        """`use` the answer and its body. A body that is not read to its end takes its connection with it."""

        def used(answer: Any) -> Any:
            with contextlib.closing(answer["Body"]) as body:
                return use(answer, body)

        return self._call("GetObject", key, used, Key=self._key(key), **fields)

    def _head(self, key: str) -> Any:
        """What `HeadObject` says, None if there is no such key."""
        try:
            return self._call("HeadObject", key, Key=self._key(key), ChecksumMode="ENABLED")
        except Missing:
            return None

    def _create_large(self, key: str, path: Path, size: int, sha256: str) -> bool:
        parts = Parts(
            call=lambda operation, **fields: self._call(operation, key, Key=self._key(key), **fields),
            patience=self._patience,
            condition={"IfNoneMatch": "*"} if self._at.fenced else {},
            sse=self._sse,
            pool=self._pool,
        )
        with disk("send a checkpoint", path):
            while True:
                try:
                    parts.send(path, size, self._at.part)
                    return True
                except _Lost:
                    return self._holds(key, size, sha256)
                except Missing:
                    # The upload is gone: completed by a request whose answer was lost, or swept away.
                    if self._patience.run(lambda: self._head(key)) is not None:
                        return self._holds(key, size, sha256)

    def _holds(self, key: str, size: int, sha256: str) -> bool:
        """Whether a key that exists has this content: by the server's own SHA-256, else by reading it."""
        head = self._patience.run(lambda: self._head(key))
        if head is None or head["ContentLength"] != size:
            return False
        kept = head.get("ChecksumSHA256")
        if kept is not None and "-" not in kept:
            return bool(kept == base64.b64encode(bytes.fromhex(sha256)).decode())
        read = self._patience.run(lambda: self._get(key, _digest))
        return bool(read == sha256)

    # --- the client ---

    def _key(self, key: str) -> str:
        return f"{self._at.prefix}/{key}" if self._at.prefix else key

    def _call(
        self, operation: str, key: str, use: Callable[[Any], Any] = lambda answer: answer, **fields: Any
    ) -> Any:
        """Send one request and `use` its answer, streams included. Any failure is one of ours.

        Raises:
            _Lost: the condition does not hold.
            Missing, Transient, AccessDenied, JobError, StorageError: see `s3_errors`.
        """
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

        said = f"{operation} {self.place}/{key}"
        if isinstance(body := fields.get("Body"), Slice):
            body.seek(0)
        try:
            client = self._clients.newest(self.place)
            method = getattr(client, _METHODS[operation])
            result = use(method(Bucket=self._at.bucket, **self._owner, **fields))
        except ClientError as error:
            what, ours = answered(operation, key, self.place, error.response, operation in self._worked)
            if what is Meaning.LOST:
                raise _Lost from error
            if what is Meaning.EXPIRED:
                self._clients.expire()  # the next call reads the credentials again
            raise ours from error
        except ParamValidationError as error:
            reason = f"{self.place}: not a place in S3: {error}"
            raise JobError([Problem("checkpoints.uri", reason, "write s3://bucket/prefix")]) from error
        except BotoCoreError as error:
            if (denied := aws.unusable(error, said)) is None:  # no answer, or half of one
                raise Transient(silent(f"{said}: {error}")) from error
            # What worked once may only be renewed too late.
            raise (Transient(denied) if self._worked else denied) from error
        self._worked.add(operation)
        return result


class _Clients:
    """The clients of a store and of what is below it: one at a time, another when its credentials expire."""

    def __init__(self) -> None:
        self._all: list[Any] = []
        """The last one is in use; those before it had credentials that have expired."""
        self._expired = True
        self._lock = threading.Lock()

    def newest(self, place: str) -> Any:
        """The client in use, made when there is none.

        Args:
            place: for messages.
        """
        with self._lock:
            if self._expired:
                try:
                    self._all.append(_client())
                except ValueError as error:  # botocore's word for an endpoint or a region that is none
                    remedy = "correct AWS_ENDPOINT_URL (as http://host:9000) or AWS_REGION"
                    raise JobError([Problem("checkpoints.uri", f"{place}: {error}", remedy)]) from error
                except OSError as error:
                    said = f"{place}: no usable credentials: {error.filename}: {error.strerror}"
                    remedy = "remedy: correct the file that AWS_* or ~/.aws names"
                    raise AccessDenied(f"{said}; {remedy}") from error
                self._expired = False
            return self._all[-1]

    def expire(self) -> None:
        """Its credentials have expired."""
        with self._lock:
            self._expired = True

    def close(self) -> None:
        for client in self._all:
            client.close()


class _Lost(Exception):
    """The condition of a write does not hold."""


_METHODS = {
    "AbortMultipartUpload": "abort_multipart_upload",
    "CompleteMultipartUpload": "complete_multipart_upload",
    "CreateMultipartUpload": "create_multipart_upload",
    "DeleteObject": "delete_object",
    "GetObject": "get_object",
    "HeadObject": "head_object",
    "ListObjectsV2": "list_objects_v2",
    "PutObject": "put_object",
    "UploadPart": "upload_part",
}


def _client() -> Any:
    # A store of one's own has no host per bucket.
    own = any(name in os.environ for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"))
    return aws.client(
        "s3",
        max_pool_connections=2 * THREADS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Every body has a checksum among the signed headers; signing the body would hash it once more.
        s3={"payload_signing_enabled": False, **({"addressing_style": "path"} if own else {})},
    )


def _content(answer: Any, body: Any) -> tuple[bytes, str, float | None]:
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:  # both times are the server's
        age = max(0.0, (parsedate_to_datetime(said) - answer["LastModified"]).total_seconds())
    except (KeyError, TypeError, ValueError):
        age = None
    return body.read(), str(answer["ETag"]), age


def _digest(answer: Any, body: Any) -> str:
    del answer
    digest = hashlib.sha256()
    while piece := body.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
