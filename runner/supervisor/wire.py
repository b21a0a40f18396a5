"""JSON lines between two supervisors over one TCP connection: what may be said, framing, heartbeats, loss.

    node 0 says     attempt     attempt, plan, pins, fingerprints, processes, address, port: get ready for it
                    start       attempt: start the ranks, every node is ready
                    end         attempt, reason: kill the ranks
                    progress    step: it is committed
                    finished    outcome, exit_code, error: the command ends
                    welcome     to a node that may follow
                    refused     reason, remedy, final: to one that may not, now or ever

    others say      hello       hello: who I am (`runner.supervisor.hello.Hello`)
                    ready       attempt: what it needs is here
                    ended       attempt, exit, outcome: the ranks are gone
                    notice      reason, seconds: this machine was asked to stop, and is gone then
                    advice      reason: this machine was asked to save
                    remark      text: for people

    both say        beat        I am here

A peer is lost when its connection closes, when it says what is none of these, and when it is silent for too
long. Nothing here knows what a run is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, TracebackType
from typing import Any, Generic, Self, TypeVar

Message = dict[str, Any]

PATIENCE = 600.0
"""Seconds that nodes wait for one another: images are pulled and machines found at different speeds."""

LINGER = 5.0
"""Seconds at the end for the last words to arrive."""

LONGEST = 1 << 22
"""Bytes of the longest line of a peer that is known: far above a plan."""

LONGEST_HELLO = 1 << 13
"""Bytes of the longest line of one that is not."""

_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "attempt": {
        "attempt": int,
        "plan": dict,
        "pins": dict,
        "fingerprints": dict,
        "processes": list,
        "address": str,
        "port": int,
    },
    "start": {"attempt": int},
    "end": {"attempt": int, "reason": str},
    "progress": {"step": int},
    "finished": {"outcome": str, "exit_code": int, "error": (str, NoneType)},
    "welcome": {},
    "refused": {"reason": str, "remedy": str, "final": bool},
    "hello": {"hello": dict},
    "ready": {"attempt": int},
    "ended": {"attempt": int, "exit": str, "outcome": (dict, NoneType)},
    "notice": {"reason": str, "seconds": (int, float, NoneType)},
    "advice": {"reason": str},
    "remark": {"text": str},
    "beat": {},
}
_BEAT: Message = {"say": "beat"}
_PIECE = 1 << 16

Item = TypeVar("Item")


@dataclass(frozen=True)
class Pulse:
    """Heartbeats of a connection."""

    beat: float = 5.0
    """Seconds between two."""
    silence: float = 30.0
    """Seconds without a word after which a peer is lost."""

    @property
    def look(self) -> float:
        """Seconds between two looks at the clock."""
        return self.beat / 5


PULSE = Pulse()


class Lost(Exception):
    """A peer is lost; the message says why."""


class Connection:
    """One connection, never waiting.

    Only time in which this process itself runs counts as silence: what a peer said while this machine slept
    may still lie in the socket.

    Args:
        longest: bytes of the longest line that is read.
    """

    def __init__(
        self,
        sock: socket.socket,
        pulse: Pulse,
        longest: int = LONGEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sock = sock
        self.longest = longest
        self._pulse = pulse
        self._clock = clock
        self._rest = b""
        """Of a line whose end has not come."""
        self._out = bytearray()
        self._silent = 0.0
        self._looked = self._spoke = clock()
        self._half_closed = False

    @property
    def pending(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._out)

    def send(self, message: Message) -> None:
        """Put a message in line; `flush` sends it."""
        line = json.dumps(message).encode() + b"\n"
        assert len(line) <= LONGEST
        self._out += line
        self._spoke = self._clock()

    def flush(self) -> None:
        """Send what the socket takes.

        Raises:
            Lost: the connection is broken.
        """
        try:
            while self._out:
                del self._out[: self.sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Lost(f"the connection broke: {error.strerror}") from error

    def receive(self) -> list[Message]:
        """The messages that are complete now, without beats.

        Raises:
            Lost: the connection is closed or broken, or a line is no message.
        """
        try:
            data = self.sock.recv(_PIECE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Lost(f"the connection broke: {error.strerror}") from error
        if not data:
            raise Lost("the connection was closed")
        self._silent = 0.0
        *lines, self._rest = (self._rest + data).split(b"\n")
        if any(len(line) > self.longest for line in (*lines, self._rest)):
            raise Lost(f"it sent a line of more than {self.longest} bytes")
        return [message for message in map(_parse, lines) if message != _BEAT]

    def tick(self) -> None:
        """Look at the clock.

        Raises:
            Lost: the peer is silent for too long.
        """
        now = self._clock()
        self._silent += min(now - self._looked, self._pulse.beat)
        self._looked = now
        if self._silent >= self._pulse.silence:
            raise Lost(f"nothing was heard of it for {self._pulse.silence:g} s")

    def beat(self) -> None:
        """Say that this side is here, if it has not spoken for a while."""
        if self._clock() - self._spoke >= self._pulse.beat:
            self.send(_BEAT)

    def finish(self) -> None:
        """Once all is sent, say no more. To close at once could take from the peer what it has not read."""
        if not self._out and not self._half_closed:
            self._half_closed = True
            with contextlib.suppress(OSError):  # it is gone already
                self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


def _parse(line: bytes) -> Message:
    try:
        message: Any = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    fields = _FIELDS.get(str(message.get("say"))) if isinstance(message, dict) else None
    if fields is None or not all(isinstance(message.get(name), kind) for name, kind in fields.items()):
        raise Lost(f"it sent what is no message: {line[:60].decode('ascii', 'replace')!r}")
    known: Message = message
    return known


class Mailbox(Generic[Item]):
    """Two queues between a supervisor's loop and the thread that serves its sockets.

    Args:
        wake: makes the loop look at `taken`; called by the thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._to_loop: deque[Item] = deque()
        self._to_thread: deque[Message] = deque()
        self.waker, self._nudge = os.pipe()
        """`waker` becomes readable when the thread has something to do."""
        os.set_blocking(self.waker, False)
        os.set_blocking(self._nudge, False)
        self.closing = threading.Event()
        """Whether the thread is to end."""

    # --- the loop's side ---

    def post(self, message: Message) -> None:
        self._to_thread.append(message)
        self._poke()

    def taken(self) -> list[Item]:
        """What came since the last call, oldest first."""
        return _drained(self._to_loop)

    def close(self) -> None:
        """Ask the thread to end."""
        self.closing.set()
        self._poke()

    def dispose(self) -> None:
        """After the thread has ended."""
        os.close(self.waker)
        os.close(self._nudge)

    def _poke(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._nudge, b"\0")

    # --- the thread's side ---

    def deliver(self, item: Item) -> None:
        self._to_loop.append(item)
        self._wake()

    def orders(self) -> list[Message]:
        """What is to be sent, oldest first."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.waker, _PIECE)
        return _drained(self._to_thread)


class Served(ABC, Generic[Item]):
    """One side of a link: a mailbox, and the thread that serves its sockets. A context, whose end waits a
    little for the last words to arrive.

    Args:
        wake: called when there is something new for the loop.
        name: of the thread.
    """

    def __init__(self, wake: Callable[[], None], name: str) -> None:
        self._mail: Mailbox[Item] = Mailbox(wake)
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mail.close()
        self._thread.join()
        self._mail.dispose()

    def send(self, message: Message) -> None:
        """To whoever is on the other side."""
        self._mail.post(message)

    @abstractmethod
    def _serve(self) -> None:
        """The thread."""


def _drained(queue: deque[Item]) -> list[Item]:
    # The length first: the other thread may append meanwhile.
    return [queue.popleft() for _ in range(len(queue))]
