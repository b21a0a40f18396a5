"""Node 0's side of the links to the nodes that follow it: who is here, and what each has said.

    node 0 (Leader)                                  every other node (Uplink)
      listens                      <- connect -        again and again, up to its patience
      compares                     <- hello -          who it is, and the hash of its job
      counts it                     - welcome ->       follows
      or closes                     - refused ->       ends, or tries again
      to all: attempt, start, end, progress, finished
                                   <- ready, ended, notice -
      both ways: beats; who is lost is said to the loop (`runner.supervisor.wire`)

A background thread serves the sockets. It moves messages between them and two queues and wakes the loop of
its supervisor, and touches nothing else. A node that is lost may join again. Nothing is encrypted and nobody
proves who he is, as in torch's own rendezvous: the port is for the nodes of the run alone.
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from runner.errors import RunnerError
from runner.supervisor.hello import Hello, Refusal, judged
from runner.supervisor.wire import (
    LINGER,
    LONGEST,
    LONGEST_HELLO,
    PATIENCE,
    PULSE,
    Connection,
    Lost,
    Message,
    Pulse,
    Served,
)

STRANGERS = 32
"""Connections that have not said hello; one more closes the oldest. A node says it at once."""


@dataclass(frozen=True)
class Said:
    """A message that node 0 heard, or what became of its connections.

    From its own thread: joined (processes, address), lost (reason), and with no node: stranger (address,
    reason).
    """

    node: int | None
    message: Message


class _Peer(Connection):
    """A connection as node 0 sees it."""

    node: int | None = None
    """Once it has said hello and is welcome."""
    leaves: bool = False
    """Whether it was told all that it will be."""


class Leader(Served[Said]):
    """Node 0's side.

    Args:
        hello: of node 0 itself.
        port: to listen on, on every address of this machine; 0: any that is free.
        wake: called when there is something new for `received`.

    Raises:
        RunnerError: the port cannot be listened on.
    """

    def __init__(self, hello: Hello, port: int, wake: Callable[[], None], pulse: Pulse = PULSE) -> None:
        self._listener = _listener(port)  # may be refused
        super().__init__(wake, "nodes")
        self._hello = hello
        self._pulse = pulse
        self.port: int = self._listener.getsockname()[1]
        self.address: str | None = None
        """What the others reach this machine by; None before the first has joined."""
        self._processes = {0: hello.processes}
        self._heard: list[Said] = []
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        self._told: set[tuple[str, str]] = set()

    # --- for the supervisor's loop ---

    @property
    def missing(self) -> list[int]:
        """Nodes that are not here now."""
        self._look()
        return [node for node in range(self._hello.nodes) if node not in self._processes]

    @property
    def processes(self) -> list[int]:
        """Ranks that each node can run, by its index; for when none is missing."""
        return [self._processes[node] for node in range(self._hello.nodes)]

    def gather(self, pause: Callable[[], None], patience: float = PATIENCE) -> None:
        """Wait until every node is here.

        Args:
            pause: waits for `wake` or a short time; what it raises ends the wait.
            patience: seconds.

        Raises:
            RunnerError: some did not come.
        """
        until = time.monotonic() + patience
        while missing := self.missing:
            if time.monotonic() >= until:
                which = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                raise RunnerError(
                    f"wait for the other nodes: after {patience:g} s {which} of {self._hello.nodes} had not "
                    f"connected to port {self.port} of node 0; remedy: look at their logs; each needs the "
                    "same command, and a way to that port"
                )
            pause()

    def received(self) -> list[Said]:
        """What was said since the last call, oldest first."""
        self._look()
        heard, self._heard = self._heard, []
        return heard

    def _look(self) -> None:
        for said in self._mail.taken():
            self._heard.append(said)
            if said.node is not None and said.message["say"] == "joined":
                self._processes[said.node] = said.message["processes"]
                self.address = self.address or said.message["address"]
            elif said.node is not None and said.message["say"] == "lost":
                del self._processes[said.node]

    # --- the thread ---

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._mail.waker, selectors.EVENT_READ)
        until = float("inf")
        try:
            while time.monotonic() < until and (self._peers or not self._mail.closing.is_set()):
                for key, events in self._selector.select(self._pulse.look):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data in self._peers and events & selectors.EVENT_READ:
                        self._read(key.data)
                closing = self._mail.closing.is_set()  # before the last orders are taken
                for message in self._mail.orders():
                    for peer in self._peers:
                        if peer.node is not None:
                            peer.send(message)
                if closing and until == float("inf"):
                    until = time.monotonic() + LINGER
                    self._selector.unregister(self._listener)
                    for peer in list(self._peers):
                        if peer.node is None:
                            self._drop(peer, None)
                        peer.leaves = True
                for peer in list(self._peers):
                    self._look_after(peer)
        finally:
            for peer in list(self._peers):
                self._drop(peer, "node 0 listens no more")
            self._selector.close()
            self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
            peer = _Peer(sock, self._pulse, LONGEST_HELLO)
        except OSError:  # it has gone again
            return
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        strangers = [peer for peer in self._peers if peer.node is None]
        if len(strangers) > STRANGERS:
            self._drop(strangers[0], "it said nothing while others came")

    def _read(self, peer: _Peer) -> None:
        try:
            for message in peer.receive():
                if peer.leaves:
                    continue
                if peer.node is None:
                    self._answer(peer, message)
                else:
                    self._mail.deliver(Said(peer.node, message))
        except Lost as lost:
            self._drop(peer, str(lost))

    def _answer(self, peer: _Peer, message: Message) -> None:
        """Answer a hello."""
        here = {other.node for other in self._peers if other.node is not None}
        try:
            hello = judged(self._hello, message.get("hello"), here)
        except ValueError as error:
            raise Lost("it said something else than hello") from error
        if isinstance(hello, Refusal):
            peer.send({"say": "refused", **asdict(hello)})
            peer.leaves = True
            self._note_stranger(peer, hello.reason)
            return
        peer.node, peer.longest = hello.node, LONGEST
        peer.send({"say": "welcome"})
        peer.flush()  # who has joined knows it
        address = _plain(peer.sock.getsockname()[0])
        joined: Message = {"say": "joined", "processes": hello.processes, "address": address}
        self._mail.deliver(Said(hello.node, joined))

    def _look_after(self, peer: _Peer) -> None:
        try:
            peer.tick()
            if peer.node is not None and not peer.leaves:
                peer.beat()
            peer.flush()
        except Lost as lost:
            self._drop(peer, str(lost))
            return
        if peer.leaves:
            peer.finish()
        write = selectors.EVENT_WRITE if peer.pending else 0
        self._selector.modify(peer.sock, selectors.EVENT_READ | write, peer)

    def _drop(self, peer: _Peer, reason: str | None) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.sock)
        if reason is not None and not peer.leaves:
            if peer.node is None:
                self._note_stranger(peer, reason)
            else:
                self._mail.deliver(Said(peer.node, {"say": "lost", "reason": reason}))
        peer.close()

    def _note_stranger(self, peer: _Peer, reason: str) -> None:
        """Say who was dropped, each only once: a probe of the port may come every second."""
        try:
            address = _plain(peer.sock.getpeername()[0])
        except OSError:  # gone before it could be asked
            address = "an unknown address"
        if len(self._told) < STRANGERS and (address, reason) not in self._told:
            self._told.add((address, reason))
            self._mail.deliver(Said(None, {"say": "stranger", "address": address, "reason": reason}))


def _listener(port: int) -> socket.socket:
    """Listen on every address of this machine, IPv6 too where it has any."""
    try:
        try:
            listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except (ValueError, OSError):  # no IPv6 here, or none with both
            listener = socket.create_server(("", port))
    except OSError as error:
        raise RunnerError(
            f"listen on port {port} for the other nodes: {error.strerror}; remedy: end what uses it, or name "
            "another port on every node, RUNNER_LEADER=host:port"
        ) from error
    listener.setblocking(False)
    return listener


def _plain(address: str) -> str:
    """An IP address without what a socket for both families writes around it: ::ffff:10.0.0.9 is 10.0.0.9."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)
