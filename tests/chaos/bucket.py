"""A bucket of the server itself, past the proxy: raw requests, for observers and verdicts."""

from __future__ import annotations

import re
import time
from http.client import HTTPConnection
from xml.sax.saxutils import unescape

SIGNED = (
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
)
"""The server wants one, and does not check it."""


TRIES = 5
"""moto is a threaded program that answers 500 now and then, when two requests meet in it."""


class Bucket:
    """One bucket."""

    def __init__(self, port: int, name: str) -> None:
        self.name = name
        self._connection = HTTPConnection("127.0.0.1", port, timeout=30)

    def make(self) -> None:
        assert self._ask("PUT", "")[0] == 200

    def read(self, key: str) -> bytes | None:
        """The content of a key, None if there is none."""
        status, data = self._ask("GET", f"/{key}")
        assert status in (200, 404), (status, data)
        return data if status == 200 else None

    def listed(self) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            status, data = self._ask("GET", f"?list-type=2{token}")
            assert status == 200, (status, data)
            found += [unescape(key) for key in re.findall("<Key>([^<]*)</Key>", data.decode())]
            more = re.search("<NextContinuationToken>([^<]*)<", data.decode())
            if more is None:
                return found
            token = f"&continuation-token={more[1]}"

    def uploads(self) -> int:
        """Multi-part uploads that were neither completed nor aborted."""
        return self._ask("GET", "?uploads")[1].count(b"<Upload>")

    def remove(self) -> None:
        """Delete all that is in it, and itself: the server keeps everything in memory."""
        for key in self.listed():
            self._ask("DELETE", f"/{key}")
        self._ask("DELETE", "")
        self.close()

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        for _ in range(TRIES):
            self._connection.request(method, f"/{self.name}{path}", headers={"Authorization": SIGNED})
            answer = self._connection.getresponse()
            status, data = answer.status, answer.read()
            if status < 500:
                break
            time.sleep(0.05)
        return status, data
