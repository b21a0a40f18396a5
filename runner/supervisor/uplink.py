"""The link of a node that follows to node 0: connects again and again, says hello, then carries messages.

The other side, and what both say, is in `runner.supervisor.link` and `runner.supervisor.wire`. What its
thread adds to the messages of node 0: `lost` (reason), and `unreachable` (reason), the last that it says.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from runner.supervisor.hello import Hello
from runner.supervisor.wire import (
    LINGER,
    PATIENCE,
    PULSE,
    Connection,
    Lost,
    Message,
    Pulse,
    Served,
)

RETRY = 1.0
"""Seconds between two tries to connect."""

CONNECT = 5.0
"""Seconds that one of them may take."""


class Uplink(Served[Message]):
    """This node's link to node 0.

    Args:
        hello: of this node.
        address, port: of node 0. Its name may not be known before its pod runs.
        wake: called when there is something new for `received`.
        patience: seconds until node 0 has to have answered.
    """

    def __init__(
        self,
        hello: Hello,
        address: str,
        port: int,
        wake: Callable[[], None],
        patience: float = PATIENCE,
        pulse: Pulse = PULSE,
    ) -> None:
        super().__init__(wake, "node 0")
        self._hello = hello
        self._place = (address, port)
        self._patience = patience
        self._pulse = pulse

    def __str__(self) -> str:
        return f"node 0 at {self._place[0]} port {self._place[1]}"

    # --- for the supervisor's loop ---

    def received(self) -> list[Message]:
        """What was said since the last call, oldest first."""
        return self._mail.taken()

    # --- the thread ---

    def _serve(self) -> None:
        until = time.monotonic() + self._patience
        why = "there was no time to try"
        try:
            while not self._mail.closing.is_set() and time.monotonic() < until:
                try:
                    # The name is looked up for each try: it moves with its pod.
                    with socket.create_connection(self._place, timeout=CONNECT) as sock:
                        connection = Connection(sock, self._pulse)
                        if self._admitted(connection):
                            self._carry(connection)
                        return
                except OSError as error:
                    why = error.strerror or str(error)
                except Lost as lost:
                    why = str(lost)
                self._mail.closing.wait(RETRY)
        finally:
            # In any case, so that nobody waits for a thread that is gone; what was said before counts.
            self._mail.deliver({"say": "unreachable", "reason": why})

    def _admitted(self, connection: Connection) -> bool:
        """Whether node 0 takes this node.

        Raises:
            Lost: it is not there yet, or does not take this node now.
        """
        connection.send({"say": "hello", "hello": asdict(self._hello)})
        while not self._mail.closing.is_set():
            connection.flush()
            select.select([connection.sock.fileno()], [], [], self._pulse.look)
            if messages := connection.receive():
                answer = messages[0]
                if answer["say"] not in ("welcome", "refused"):
                    raise Lost("what listens there is no node 0")
                if answer["say"] == "refused" and not answer["final"]:
                    raise Lost(answer["reason"])
                for message in messages:
                    self._mail.deliver(message)
                return bool(answer["say"] == "welcome")
            connection.tick()
        return False

    def _carry(self, connection: Connection) -> None:
        """Carry messages until either side ends."""
        until, sock = float("inf"), connection.sock.fileno()
        try:
            while time.monotonic() < until:
                write = [sock] if connection.pending else []
                waker = [] if self._mail.closing.is_set() else [self._mail.waker]
                select.select([sock, *waker], write, [], self._pulse.look)
                for message in connection.receive():
                    self._mail.deliver(message)
                closing = self._mail.closing.is_set()  # before the last orders are taken
                for message in self._mail.orders():
                    connection.send(message)
                connection.tick()
                if not closing:
                    connection.beat()
                connection.flush()
                if closing:
                    until = min(until, time.monotonic() + LINGER)
                    connection.finish()
        except Lost as lost:
            self._mail.deliver({"say": "lost", "reason": str(lost)})
