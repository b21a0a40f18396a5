"""One bounded request to a metadata service: no proxy, no redirect, no more time or bytes than allowed."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MOST = 1 << 16
"""Bytes of an answer that are read; the longest that is meant has a few hundred."""


class Unusable(Exception):
    """A service that gave no answer, or one that means nothing. The message says which."""


@dataclass(frozen=True)
class Answer:
    """What came."""

    status: int
    headers: Mapping[str, str]
    """By name in small letters."""
    text: str

    @property
    def at(self) -> float | None:
        """The service's own time, Unix seconds; None if it did not say. This machine's clock may be wrong."""
        return timestamp(self.headers.get("date", ""))


def timestamp(text: str) -> float | None:
    """`Mon, 19 Sep 2026 18:29:47 GMT` as Unix seconds; None if it is something else."""
    try:
        at = parsedate_to_datetime(text)
        return (at.replace(tzinfo=UTC) if at.tzinfo is None else at).timestamp()
    except (ValueError, OverflowError):
        return None


def ask(method: str, endpoint: str, path: str, headers: Mapping[str, str], seconds: float) -> Answer:
    """Send a request without a body.

    Args:
        endpoint: `http://169.254.169.254`.
        path: with its query.
        seconds: that everything together may take, however slowly it comes.

    Raises:
        Unusable: nothing came in time, or no HTTP.
    """
    try:
        with contextlib.closing(_Bounded(endpoint, seconds)) as connection:
            connection.request(method, path, headers={**headers, "Connection": "close"})
            response = connection.getresponse()
            text = response.read(_MOST).decode("utf-8", "replace")
    except TimeoutError as error:
        raise Unusable(f"{endpoint}{path}: no answer within {seconds:g} s") from error
    except (OSError, HTTPException, ValueError) as error:  # also of an address that is none
        why = str(error) or type(error).__name__
        raise Unusable(f"{endpoint}{path}: {why[:200]}") from error
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, text)


class _Bounded(HTTPConnection):
    """A connection that ends at a time; the standard one bounds each read, and a slow server sends bytes
    for ever. It knows no proxies."""

    def __init__(self, endpoint: str, seconds: float) -> None:
        parts = urlsplit(endpoint)
        super().__init__(parts.hostname or "", parts.port or 80)
        self._until = time.monotonic() + seconds

    def connect(self) -> None:
        left = max(0.001, self._until - time.monotonic())
        plain = socket.create_connection((self.host, self.port), timeout=left)
        self.sock = _Socket(plain.family, plain.type, plain.proto, plain.detach())
        self.sock.until = self._until


class _Socket(socket.socket):
    """Every call gets what is left of the time."""

    until = 0.0

    def _hurry(self) -> None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)

    def sendall(self, data: Buffer, flags: int = 0, /) -> None:
        self._hurry()
        super().sendall(data, flags)

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        self._hurry()
        return super().recv_into(buffer, nbytes, flags)
