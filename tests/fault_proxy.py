"""A proxy before a store, that does to requests and answers what networks and stores do.

    with FaultProxy(port_of_the_store) as proxy:
        proxy.fail("PUT", "/HEAD", "after")      # the server acts, the answer is lost
        ...
        proxy.heads                              # every HEAD that the server accepted, in order

    before, after     the connection is cut before or after the server acted
    truncate          half the answer, then the connection is cut
    long, short       the answer's Content-Length is a byte too large or too small; then the connection is cut
    corrupt           one byte of the answer is another
    rot               one byte of the request is another, and the server does not mind
    <number>          that answer; the server hears nothing. A code may follow: "403 ExpiredToken"
    <seconds>s        the answer is late by so much

A fault meets the first requests that its method and the end of its path fit, once each unless it says more;
of one access key alone, if it names one.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler

from tests.loopback import Loopback

CODES = {409: "ConditionalRequestConflict", 412: "PreconditionFailed", 500: "InternalError", 503: "SlowDown"}

_HOP = {"connection", "transfer-encoding", "keep-alive", "server", "date", "expect"}


@dataclass
class Fault:
    """What shall happen, to which requests, how often."""

    method: str
    path: str
    """Regular expression that the end of path and query must match."""
    how: str
    times: int
    key: str = ""
    """Access key of the requests; empty: of any."""
    met: int = 0


class FaultProxy(Loopback):
    """The proxy, in threads of this process, on `port`."""

    def __init__(self, store: int) -> None:
        super().__init__()
        self._store = store
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method, and path with query, as they came."""
        self.heads: list[bytes] = []
        """Bodies of the writes of a HEAD that the server accepted."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, method: str, path: str, how: str, times: int = 1, key: str = "") -> Fault:
        """Plan a fault."""
        fault = Fault(method, path, how, times, key)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults, and nothing seen yet."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.heads.clear()

    def _fault(self, method: str, path: str, signed: str) -> str:
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                fits = fault.method == method and re.search(f"(?:{fault.path})$", path)
                if fits and f"Credential={fault.key}" in signed and fault.met < fault.times:
                    fault.met += 1
                    return fault.how
        return ""

    def _serve(self, client: BaseHTTPRequestHandler) -> None:
        length = int(client.headers.get("Content-Length", 0))
        body = client.rfile.read(length)
        how = self._fault(client.command, client.path, client.headers.get("Authorization", "Credential="))
        if how == "before":
            return self._cut(client)
        if how[:3].isdecimal():
            status, _, code = how.partition(" ")
            return self._refuse(client, int(status), code or CODES[int(status)])
        if how == "rot" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, headers, answer = self._forward(client, body)
        if client.command == "PUT" and client.path.endswith("/HEAD") and status == 200:
            with self._lock:
                self.heads.append(body)
        if how == "after":
            return self._cut(client)
        if how.endswith("s"):
            time.sleep(float(how[:-1]))
        if how == "corrupt" and answer:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        off = {"long": 1, "short": -1}.get(how, 0)
        client.send_response(status)
        for name, value in headers:
            if off and answer and name.lower() == "content-length":
                value = str(int(value) + off)
            client.send_header(name, value)
        client.end_headers()
        if client.command != "HEAD":
            client.wfile.write(answer[: len(answer) // 2] if how == "truncate" else answer)
        if how in ("truncate", "long", "short"):
            self._cut(client)
        return None

    def _forward(
        self, client: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        store = HTTPConnection("127.0.0.1", self._store, timeout=60)
        headers = {name: value for name, value in client.headers.items() if name.lower() not in _HOP}
        try:
            store.request(client.command, client.path, body, headers)
            response: HTTPResponse = store.getresponse()
            answer = response.read()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP]
            if not any(name.lower() == "content-length" for name, _ in kept):
                kept.append(("Content-Length", str(len(answer))))
            return response.status, kept, answer
        except (OSError, HTTPException):
            return 503, [("Content-Length", "0")], b""
        finally:
            store.close()

    def _refuse(self, client: BaseHTTPRequestHandler, status: int, code: str) -> None:
        text = "" if client.command == "HEAD" else f"<Error><Code>{code}</Code><Message>no</Message></Error>"
        client.send_response(status)
        client.send_header("Content-Type", "application/xml")
        client.send_header("Content-Length", str(len(text)))
        client.end_headers()
        client.wfile.write(text.encode())

    def _cut(self, client: BaseHTTPRequestHandler) -> None:
        client.close_connection = True
        client.wfile.flush()
        with contextlib.suppress(OSError):
            client.connection.shutdown(2)
