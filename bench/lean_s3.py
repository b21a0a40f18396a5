"""A lean S3 server for measurements: it moves bytes, keeps them in memory, and checks next to nothing.

    python bench/lean_s3.py [--port N] [--delay SECONDS]      serves until it is killed
    python bench/lean_s3.py --measure                         what it moves itself, against plain sockets

It knows PUT, GET (ranges), HEAD, DELETE, ListObjectsV2, uploads in parts and conditional writes, by
path-style addresses, under any signature. Bodies go from the socket into memory by one copy, and back by
`sendfile`. A checksum is handed back as it was sent; nobody compares it. Bodies in `aws-chunked` are refused:
no client sends them over plain HTTP. A DELETE of a bucket empties it. Whoever reads what is being deleted
reads garbage.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import mmap
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

CHUNK = 1 << 20
ROOM = 16 << 30
"""Bytes of addresses for bodies; memory is taken when it is used, and used again."""

BUCKET = "bench"

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What clients need besides `AWS_ENDPOINT_URL` (s5cmd: `S3_ENDPOINT_URL`)."""

Extents = list[tuple[int, int]]
"""Offset and length of the pieces of a body in the arena, in order."""


class Arena:
    """Memory for bodies, in chunks."""

    def __init__(self) -> None:
        self.handle = os.memfd_create("bodies")
        os.ftruncate(self.handle, ROOM)
        self.memory = memoryview(mmap.mmap(self.handle, ROOM))
        self._free: list[int] = []
        self._end = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Extents:
        """Room for `size` bytes."""
        with self._lock:
            extents = []
            for start in range(0, size, CHUNK):
                if not self._free:
                    self._free.append(self._end)
                    self._end += CHUNK
                extents.append((self._free.pop(), min(CHUNK, size - start)))
            return extents

    def give(self, extents: Extents) -> None:
        """Take it back."""
        with self._lock:
            self._free += [offset for offset, _ in extents]


@dataclass(frozen=True)
class Body:
    """An object, or a part of one."""

    extents: Extents
    size: int
    etag: str
    checksums: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Request:
    """What was asked, its body in the arena."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Body


class Refused(Exception):
    """An error answer: status and code."""


class Server:
    """Buckets, uploads, and one thread for each connection.

    Args:
        delay: seconds before every answer.
    """

    def __init__(self, port: int, delay: float) -> None:
        self._arena = Arena()
        self._delay = delay
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Body]] = {BUCKET: {}}
        self._uploads: dict[str, dict[int, Body]] = {}
        self._count = itertools.count(1)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = self._listener.getsockname()[1]

    def serve(self) -> None:
        """Answer for ever."""
        while True:
            client, _ = self._listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        with client, contextlib.suppress(ConnectionError):
            rest = b""
            while True:
                while b"\r\n\r\n" not in rest:
                    piece = client.recv(CHUNK)
                    if not piece:
                        return
                    rest += piece
                head, _, rest = rest.partition(b"\r\n\r\n")
                request, rest = self._request(client, head.decode("latin-1"), rest)
                time.sleep(self._delay)
                try:
                    self._answer(client, request)
                except Refused as error:
                    status, code = error.args
                    text = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
                    _send(client, status, [], "" if request.method == "HEAD" else text)

    def _request(self, client: socket.socket, head: str, rest: bytes) -> tuple[Request, bytes]:
        """A request, its body read; and what came after it."""
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("expect") == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(headers.get("content-length", 0))
        extents = self._arena.take(size)
        for offset, length in extents:
            have = rest[:length]
            rest = rest[len(have) :]
            self._arena.memory[offset : offset + len(have)] = have
            into = self._arena.memory[offset + len(have) : offset + length]
            if into and client.recv_into(into, len(into), socket.MSG_WAITALL) != len(into):
                raise ConnectionError("half a body")
        url = urlsplit(target)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        sums = tuple(
            (name, value) for name, value in headers.items() if name.startswith("x-amz-checksum-") and value
        )
        body = Body(extents, size, f'"{next(self._count):032x}"', sums)
        return Request(method, bucket, key, query, headers, body), rest

    def _answer(self, client: socket.socket, request: Request) -> None:
        encoding = f"{request.headers.get('content-encoding')} {request.headers.get('transfer-encoding')}"
        if "chunked" in encoding:
            raise Refused(501, "NotImplemented")
        with self._lock:
            objects = self._buckets.setdefault(request.bucket, {})
        match request.method, bool(request.key):
            case "PUT", True if "partNumber" in request.query:
                with self._lock:
                    self._upload(request)[int(request.query["partNumber"])] = request.body
                _send(client, 200, [("ETag", request.body.etag), *request.body.checksums])
            case "PUT", True:
                self._put(objects, request, request.body)
                _send(client, 200, [("ETag", request.body.etag), *request.body.checksums])
            case "POST", True if "uploads" in request.query:
                name = f"upload-{next(self._count)}"
                with self._lock:
                    self._uploads[name] = {}
                _send(client, 200, [], _xml("InitiateMultipartUploadResult", request, ("UploadId", name)))
            case "POST", True:
                body = self._complete(objects, request)
                _send(client, 200, [], _xml("CompleteMultipartUploadResult", request, ("ETag", body.etag)))
            case "POST", False:  # DeleteObjects
                named = ElementTree.fromstring(self._bytes(request.body)).iter()
                for key in [one.text for one in named if one.tag.endswith("Key")]:
                    self._delete(objects, str(key))
                _send(client, 200, [], "<DeleteResult></DeleteResult>")
            case (("GET" | "HEAD"), True):
                self._get(client, objects, request)
            case "GET", False:
                _send(client, 200, [], self._list(objects, request))
            case "DELETE", True if "uploadId" in request.query:
                with self._lock:
                    for part in self._uploads.pop(request.query["uploadId"], {}).values():
                        self._arena.give(part.extents)
                _send(client, 204, [])
            case "DELETE", True:
                self._delete(objects, request.key)
                _send(client, 204, [])
            case "DELETE", False:
                for key in list(objects):
                    self._delete(objects, key)
                _send(client, 204, [])
            case _:
                _send(client, 200, [])

    def _upload(self, request: Request) -> dict[int, Body]:
        if request.query.get("uploadId", "") not in self._uploads:
            raise Refused(404, "NoSuchUpload")
        return self._uploads[request.query["uploadId"]]

    def _put(self, objects: dict[str, Body], request: Request, body: Body) -> None:
        with self._lock:
            held = objects.get(request.key)
            if request.headers.get("if-none-match") == "*" and held is not None:
                raise Refused(412, "PreconditionFailed")
            if (etag := request.headers.get("if-match")) is not None:
                if held is None:
                    raise Refused(404, "NoSuchKey")
                if held.etag != etag:
                    raise Refused(412, "PreconditionFailed")
            objects[request.key] = body
        if held is not None:
            self._arena.give(held.extents)

    def _complete(self, objects: dict[str, Body], request: Request) -> Body:
        with self._lock:
            parts = self._upload(request)
        chosen = [parts[number] for number in sorted(parts)]
        extents = [extent for part in chosen for extent in part.extents]
        whole = [
            pair
            for pair in request.headers.items()
            if pair[0].startswith("x-amz-checksum-") and pair[0] != "x-amz-checksum-type"
        ]
        etag = f'"{next(self._count):032x}-{len(chosen)}"'
        body = Body(extents, sum(part.size for part in chosen), etag, tuple(whole))
        self._put(objects, request, body)
        with self._lock:
            del self._uploads[request.query["uploadId"]]
        return body

    def _delete(self, objects: dict[str, Body], key: str) -> None:
        with self._lock:
            held = objects.pop(key, None)
        if held is not None:
            self._arena.give(held.extents)

    def _get(self, client: socket.socket, objects: dict[str, Body], request: Request) -> None:
        body = objects.get(request.key)
        if body is None:
            raise Refused(404, "NoSuchKey")
        headers = [("ETag", body.etag), ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")]
        start, end, status = 0, body.size, 200
        if (span := request.headers.get("range", "")).startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or body.size - 1) + 1, body.size)
            if start >= body.size:
                raise Refused(416, "InvalidRange")
            status = 206
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{body.size}"))
        elif request.headers.get("x-amz-checksum-mode"):
            headers += body.checksums
        _send(client, status, [*headers, ("Accept-Ranges", "bytes")], length=end - start)
        if request.method == "HEAD":
            return
        starts = [0, *itertools.accumulate(length for _, length in body.extents)]
        for index in range(bisect.bisect_right(starts, start) - 1, len(body.extents)):
            if starts[index] >= end:
                return
            offset, length = body.extents[index]
            at = offset + max(start - starts[index], 0)
            until = offset + min(length, end - starts[index])
            while at < until:
                at += os.sendfile(client.fileno(), self._arena.handle, at, until - at)

    def _list(self, objects: dict[str, Body], request: Request) -> str:
        prefix, after = request.query.get("prefix", ""), request.query.get("continuation-token", "")
        keys = sorted(key for key in list(objects) if key.startswith(prefix) and key > after)
        page = keys[: int(request.query.get("max-keys", 1000))]
        more = len(page) < len(keys)
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{objects[key].size}</Size>"
            f"<ETag>{escape(objects[key].etag)}</ETag><StorageClass>STANDARD</StorageClass>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>{request.bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{token}{items}</ListBucketResult>"
        )

    def _bytes(self, body: Body) -> bytes:
        return b"".join(bytes(self._arena.memory[at : at + length]) for at, length in body.extents)


def _xml(name: str, request: Request, field: tuple[str, str]) -> str:
    where = f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
    return f"<{name}>{where}<{field[0]}>{escape(field[1])}</{field[0]}></{name}>"


def _send(
    client: socket.socket,
    status: int,
    headers: list[tuple[str, str]],
    text: str = "",
    length: int | None = None,
) -> None:
    """An answer with a short body, or the head of one whose body of `length` bytes follows."""
    lines = [f"HTTP/1.1 {status} {'OK' if status < 300 else 'Refused'}"]
    if status != 204:
        lines.append(f"Content-Length: {len(text.encode()) if length is None else length}")
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"Content-Type: {'application/xml' if text else 'application/octet-stream'}")
    client.sendall("\r\n".join([*lines, "", text]).encode())


@contextlib.contextmanager
def lean_s3(delay: float = 0.0) -> Iterator[str]:
    """Run a server in a process of its own; yields its endpoint."""
    command = [sys.executable, __file__, "--delay", str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def empty(endpoint: str) -> None:
    """Delete everything."""
    with _connected(endpoint) as client:
        client.sendall(f"DELETE /{BUCKET} HTTP/1.1\r\n\r\n".encode())
        client.recv(CHUNK)


def raw(endpoint: str, size: int, connections: int = 4) -> tuple[float, float]:
    """Seconds to send and to receive `size` bytes over plain sockets, nothing done with them."""

    def put(number: int) -> None:
        with _connected(endpoint) as client:
            client.sendall(f"PUT /{BUCKET}/raw/{number} HTTP/1.1\r\nContent-Length: {share}\r\n\r\n".encode())
            for start in range(0, share, CHUNK):
                client.sendall(block[: share - start])
            client.recv(CHUNK)

    def get(number: int) -> None:
        into = memoryview(bytearray(CHUNK))
        with _connected(endpoint) as client:
            client.sendall(f"GET /{BUCKET}/raw/{number} HTTP/1.1\r\n\r\n".encode())
            left = share
            while left > 0:
                left -= client.recv_into(into)

    share, block = size // connections, memoryview(os.urandom(CHUNK))
    taken = []
    for act in (put, get):
        threads = [threading.Thread(target=act, args=(number,)) for number in range(connections)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken.append(time.perf_counter() - began)
    empty(endpoint)
    return taken[0], taken[1]


def _connected(endpoint: str) -> socket.socket:
    url = urlsplit(endpoint)
    return socket.create_connection((str(url.hostname), int(url.port or 80)))


def main() -> None:
    """Serve, or measure the server alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if not options.measure:
        server = Server(options.port, options.delay)
        print(f"http://127.0.0.1:{server.port}", flush=True)
        server.serve()
    with lean_s3() as endpoint:
        size = 2 << 30
        raw(endpoint, size)  # memory is taken the first time
        taken = [raw(endpoint, size) for _ in range(5)]
        for number, name in enumerate(("PUT", "GET")):
            print(f"{name}: {size / statistics.median(one[number] for one in taken) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
