"""One large file as the parts of an S3 upload: read as they go, sent in parallel, completed once.

    CreateMultipartUpload -> UploadPart, several at once -> CompleteMultipartUpload, if nobody has the key

The object's checksum is the CRC-32 of the whole file (`FULL_OBJECT`), put together from those of its parts;
a SHA-256 over parts is one of their hashes only. An upload that fails is aborted, so that its parts are not
paid for.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runner.checkpoint.store import Patience
from runner.errors import RunnerError

MOST_PARTS = 10_000
"""S3's limit."""

_PIECE = 256 << 10
"""Bytes of a file that are read, summed and sent at once: what a core's cache holds."""

_CRC32 = 0xEDB88320
"""The polynomial, lowest power in the highest bit."""


class Slice(io.RawIOBase):
    """A part of a file as a file, for a body that is read as it is sent.

    `read` hands out its own buffer, to be used before the next call, as much as that holds: urllib3 asks for
    16 KiB at a time, and there is no public way to make it ask for more.
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        super().__init__()
        self._handle = os.open(path, os.O_RDONLY)
        self._start = start
        self._size = size
        self._at = 0
        self._buffer = memoryview(bytearray(min(_PIECE, size)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._size

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1, /) -> Any:
        del size
        wanted = min(len(self._buffer), self._size - self._at)
        if wanted <= 0:
            return b""
        count = os.preadv(self._handle, [self._buffer[:wanted]], self._start + self._at)
        self._at += count
        return self._buffer[:count]

    def crc32(self) -> int:
        """CRC-32 of the whole part."""
        crc = 0
        self.seek(0)
        while piece := self.read():
            crc = zlib.crc32(piece, crc)
        return crc


def joined(first: int, second: int, size: int) -> int:
    """CRC-32 of two pieces one after the other, from theirs and the `size` of the second in bytes.

    The first is multiplied by x^(8 size) modulo the polynomial of CRC-32, as zlib's crc32_combine does.
    """
    power, square = 1 << 31, 1 << 23  # x^0, x^8
    while size:
        if size & 1:
            power = _product(power, square)
        square, size = _product(square, square), size >> 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """Of two polynomials over bits, modulo that of CRC-32."""
    product = 0
    for power in range(31, -1, -1):
        if a >> power & 1:
            product ^= b
        b = b >> 1 ^ (_CRC32 if b & 1 else 0)
    return product


def cut(size: int, part: int) -> list[tuple[int, int]]:
    """Start and length of the parts of `size` bytes: one at least, at most as many as S3 takes.

    size    part   ->
    0       4         (0, 0)
    8       4         (0, 4) (4, 4)
    9       4         (0, 4) (4, 4) (8, 1)
    """
    part = max(part, -(-size // MOST_PARTS))
    return [(start, min(part, size - start)) for start in range(0, max(size, 1), part)]


@dataclass(frozen=True)
class Parts:
    """How to send a file in parts to one key."""

    call: Callable[..., Any]
    """`call(operation, **fields)` of the S3 API, with bucket and key; raises `runner.checkpoint.store`'s."""
    patience: Patience
    condition: Mapping[str, str]
    """Of the completion."""
    sse: Mapping[str, str]
    pool: Executor
    """Whose threads send parts; files share it, so that many are no more in flight than one."""

    def send(self, path: Path, size: int, part: int) -> None:
        """Upload and complete.

        Raises:
            Missing: the upload is not there any more; perhaps an unanswered request has completed it.
            RunnerError, and what `call` raises for a condition that does not hold.
        """
        begin = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT", **self.sse}
        upload = self.patience.run(lambda: self.call("CreateMultipartUpload", **begin))["UploadId"]
        try:
            sent, whole = self._upload(upload, path, cut(size, part))
            self.patience.run(
                lambda: self.call(
                    "CompleteMultipartUpload",
                    UploadId=upload,
                    MultipartUpload={"Parts": sent},
                    ChecksumCRC32=whole,
                    ChecksumType="FULL_OBJECT",
                    MpuObjectSize=size,
                    **self.condition,
                )
            )
        except BaseException:
            with contextlib.suppress(RunnerError):  # the bucket's lifecycle rule takes what stays
                self.call("AbortMultipartUpload", UploadId=upload)
            raise

    def _upload(
        self, upload: str, path: Path, parts: list[tuple[int, int]]
    ) -> tuple[list[dict[str, Any]], str]:
        """Send all parts. Returns what the completion names, and the checksum of the file."""
        jobs = [
            self.pool.submit(self._part, upload, number, path, start, size)
            for number, (start, size) in enumerate(parts, start=1)
        ]
        whole = 0
        try:
            for job, (_, size) in zip(jobs, parts, strict=True):
                whole = joined(whole, job.result()[1], size)
            return [job.result()[0] for job in jobs], _base64(whole)
        finally:
            finish(jobs)

    def _part(
        self, upload: str, number: int, path: Path, start: int, size: int
    ) -> tuple[dict[str, Any], int]:
        with Slice(path, start, size) as body:
            crc = body.crc32()
            answer = self.patience.run(
                lambda: self.call(
                    "UploadPart", UploadId=upload, PartNumber=number, Body=body, ChecksumCRC32=_base64(crc)
                )
            )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": _base64(crc)}, crc


def finish(jobs: Sequence[Future[Any]]) -> None:
    """Let nothing of these begin any more, and wait for what has begun."""
    for job in jobs:
        job.cancel()
    wait(jobs)


def _base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
