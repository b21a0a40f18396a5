"""One large file as the parts of an S3 upload: read as they go, sent in parallel, completed once.

    CreateMultipartUpload -> UploadPart, several at once -> CompleteMultipartUpload, if nobody has the key

The object's checksum is the CRC-32 of the whole file (`FULL_OBJECT`): a SHA-256 over parts is one of their
hashes only. An upload that fails is aborted, so that its parts are not paid for.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runner.checkpoint.store import Patience
from runner.errors import RunnerError

MOST_PARTS = 10_000
"""S3's limit."""

_PIECE = 1 << 20


class Slice(io.RawIOBase):
    """A part of a file as a file, for a body that is read as it is sent."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        super().__init__()
        self._handle = os.open(path, os.O_RDONLY)
        self._start = start
        self._size = size
        self._at = 0

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

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = os.pread(self._handle, wanted, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


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
    threads: int

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
        whole = 0
        with ThreadPoolExecutor(self.threads) as pool:
            jobs: list[Future[dict[str, Any]]] = []
            try:
                for number, (start, size) in enumerate(parts, start=1):
                    crc = 0
                    with Slice(path, start, size) as body:
                        while piece := body.read(_PIECE):
                            crc, whole = zlib.crc32(piece, crc), zlib.crc32(piece, whole)
                    jobs.append(pool.submit(self._part, upload, number, path, start, size, _base64(crc)))
                return [job.result() for job in jobs], _base64(whole)
            finally:
                pool.shutdown(cancel_futures=True)

    def _part(self, upload: str, number: int, path: Path, start: int, size: int, crc: str) -> dict[str, Any]:
        with Slice(path, start, size) as body:
            answer = self.patience.run(
                lambda: self.call(
                    "UploadPart", UploadId=upload, PartNumber=number, Body=body, ChecksumCRC32=crc
                )
            )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": crc}


def _base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
