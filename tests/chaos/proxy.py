"""The fault proxy with a trigger: at the n-th call of a run, before or after the server acts, one is hit.

    with KillProxy(port_of_the_store) as proxy:
        trace = proxy.trace(bucket)                    # of one run
        trace.arm(Strike(at=17, side="after"), act)    # calls count from here
        ...
        trace.mutations                                # what the server accepted, in its order

    before    act, and the server never hears of it
    late      act, and the server hears of it a while later: the network had it
    after     the server acts, then act; the answer finds nobody
    around    act, then the server acts and answers: whoever is stopped finds the answer when it wakes up

Writes to one run reach the server one at a time, so that their order is known.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import unquote

from tests.fault_proxy import FaultProxy

LATE = 0.3
"""Seconds that a late request is on its way, unless it says more."""

Side = Literal["before", "after", "late", "around"]

GONE = (503, [("Content-Length", "0")], b"")
"""For a client that is dead."""

Answer = tuple[int, list[tuple[str, str]], bytes]


@dataclass(frozen=True)
class Strike:
    """When to act: at the n-th call from now, or the n-th at a place."""

    at: int
    side: Side
    place: str | None = None
    """As `place_of` says it; None: any."""
    delay: float = LATE
    """Seconds that a late request is on its way."""


@dataclass(frozen=True)
class Mutation:
    """A write that the server accepted."""

    method: str
    key: str
    """In the run, without the query."""
    body: bytes = b""
    """Of HEAD and manifests."""
    condition: str | None = None
    """`*` for If-None-Match, else the etag of If-Match."""
    etag: str | None = None
    when: float = 0.0


@dataclass
class Trace:
    """What one run asked of its store."""

    bucket: str
    calls: int = 0
    """Since the last `arm`."""
    places: Counter[str] = field(default_factory=Counter)
    mutations: list[Mutation] = field(default_factory=list)
    under_way: int = 0
    struck: str | None = None
    """The place of the call that the last strike hit."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    order: threading.Lock = field(default_factory=threading.Lock)
    _strike: Strike | None = None
    _act: Callable[[], None] = lambda: None
    _who: str | None = None

    def arm(
        self, strike: Strike | None, act: Callable[[], None] = lambda: None, who: str | None = None
    ) -> None:
        """Count calls from here, and act at one of them.

        Args:
            who: count only calls under this access key.
        """
        with self.lock:
            self.calls, self.struck, self.places = 0, None, Counter()
            self._strike, self._act, self._who = strike, act, who

    def arrived(self, place: str, authorization: str) -> Strike | None:
        """Take note of a call; returns the strike that it is the time for."""
        with self.lock:
            if self._who is not None and f"Credential={self._who}/" not in authorization:
                return None
            self.calls += 1
            self.places[place] += 1
            strike = self._strike
            if strike is None or self.struck is not None:
                return None
            number = self.calls if strike.place is None else self.places[strike.place]
            if number != strike.at or strike.place not in (None, place):
                return None
            self.struck = place
            return strike

    def act(self) -> None:
        self._act()

    def heads(self) -> list[Mutation]:
        """The HEADs that the server accepted, in order."""
        with self.lock:
            return [one for one in self.mutations if one.key == "HEAD"]


_KINDS = ("HEAD", "run.json", "blobs", "checkpoints", "events", "pins", "probe")


def place_of(method: str, key: str, query: str, body: bytes = b"") -> str:
    """A call in words that do not name a hash: `PUT blobs`, `UploadPart`, `LIST checkpoints`."""
    if method == "GET" and "list-type=2" in query:
        prefix = re.search(r"prefix=([^&]*)", query)
        kind = unquote(prefix[1]).rstrip("/").rpartition("/")[2] if prefix else ""
        return f"LIST {kind}"
    if "uploads" in query:
        return "CreateMultipartUpload"
    if "partNumber=" in query:
        return "UploadPart"
    if "uploadId=" in query:
        return {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}.get(method, method)
    kind = next((kind for kind in _KINDS if key.startswith(kind)), key)
    if key.startswith("checkpoints/") and key.endswith("-final.json"):
        return f"{method} checkpoints of the end"
    done = key == "HEAD" and b'"state": "done"' in body
    return f"{method} {kind}{' done' if done else ''}"


class KillProxy(FaultProxy):
    """The proxy; a run has a bucket of its own."""

    def __init__(self, store: int) -> None:
        super().__init__(store)
        # Twelve connections at once from each run are more than the five that http.server lets wait; whoever
        # finds no place there tries again after seconds.
        self._server.socket.listen(512)
        self._traces: dict[str, Trace] = {}
        self.total = 0
        """Calls that came through."""

    def trace(self, bucket: str) -> Trace:
        """The record of one run, from now on."""
        return self._traces.setdefault(bucket, Trace(bucket))

    def forget(self, bucket: str) -> None:
        """Drop the record of a run, and what was planned for it."""
        del self._traces[bucket]
        with self._lock:
            self._faults = [fault for fault in self._faults if f"/{bucket}/" not in fault.path]

    def _fault(self, method: str, path: str, signed: str) -> str:
        self.requests.clear()  # kept in traces, and a campaign makes a hundred thousand
        self.heads.clear()
        return super()._fault(method, path, signed)

    def _forward(self, client: BaseHTTPRequestHandler, body: bytes) -> Answer:
        path, _, query = client.path.partition("?")
        bucket, _, rest = path.lstrip("/").partition("/")
        self.total += 1
        trace = self._traces.get(bucket)
        if len(body) < int(client.headers.get("Content-Length", 0)):
            return GONE  # it was killed while it sent; the store would wait for the rest
        if trace is None:
            return super()._forward(client, body)
        with trace.lock:
            trace.under_way += 1
        try:
            return self._seen(trace, client, unquote(rest), query, body)
        finally:
            with trace.lock:
                trace.under_way -= 1

    def _seen(
        self, trace: Trace, client: BaseHTTPRequestHandler, rest: str, query: str, body: bytes
    ) -> Answer:
        key = re.sub(r"^[^/]*/[^/]*/", "", rest)  # without prefix and name of the run
        strike = trace.arrived(
            place_of(client.command, key, query, body), client.headers.get("Authorization", "")
        )
        side = None if strike is None else strike.side
        if side in ("before", "late", "around"):
            trace.act()
        if side == "before":
            return GONE
        if strike is not None and side == "late":
            time.sleep(strike.delay)
        if client.command in ("GET", "HEAD") or "partNumber=" in query:
            answer = super()._forward(client, body)
        else:
            with trace.order:
                answer = super()._forward(client, body)
                self._record(trace, client, key, query, body, answer)
        if side == "after":
            trace.act()
        return answer

    def _record(
        self,
        trace: Trace,
        client: BaseHTTPRequestHandler,
        key: str,
        query: str,
        body: bytes,
        answer: Answer,
    ) -> None:
        method = client.command
        completes = method == "POST" and "uploadId=" in query
        if answer[0] >= 300 or (query and not completes and "x-id=" not in query):
            return
        if completes and b"<Error>" in answer[2]:
            return
        headers = {name.lower(): value for name, value in answer[1]}
        kept = body if key == "HEAD" or key.startswith("checkpoints/") else b""
        mutation = Mutation(
            "PUT" if completes else method,
            key,
            kept,
            client.headers.get("If-None-Match") or client.headers.get("If-Match"),
            headers.get("etag"),
            time.monotonic(),
        )
        with trace.lock:
            trace.mutations.append(mutation)
