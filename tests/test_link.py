"""The links between nodes: who is refused, what strangers can do, and what counts as silence."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from runner.errors import (
    AccessDenied,
    DataError,
    JobError,
    NoProgress,
    NotOwner,
    Preempted,
    RunnerError,
    StorageError,
    UsageError,
)
from runner.manifest import Job
from runner.supervisor.follow import finished
from runner.supervisor.hello import Hello, Refusal, job_hashes, judged
from runner.supervisor.link import STRANGERS, Leader, Said
from runner.supervisor.uplink import Uplink
from runner.supervisor.wire import LONGEST_HELLO, Connection, Lost, Pulse
from tests.small_job import SMALL, with_value

PULSE = Pulse(beat=0.2, silence=3.0)
ZERO = Hello(run="small", node=0, nodes=3, processes=2, job=job_hashes(Job.model_validate(SMALL)))
ONE = replace(ZERO, node=1)


@pytest.mark.parametrize(
    ("changes", "here", "reason", "final"),
    [
        ({"version": "0.0.1"}, [], "runs vlm-runner", True),
        ({"version": "99", "new": 1}, [], "this node 99", True),
        ({"run": "other"}, [], "node 0 leads run small", True),
        ({"nodes": 2}, [], "launch.nodes is 3", True),
        ({"node": 0}, [], "node 0 is none of 1 to 2", True),
        ({"node": 3}, [], "node 3 is none of 1 to 2", True),
        (
            {"job": ONE.job | {"seed": "x", "lora": "y"}},
            [],
            "differs from that of node 0 in lora, seed",
            True,
        ),
        ({"job": {}}, [1], "differs", True),
        ({}, [1], "another node 1", False),
    ],
)
def test_who_is_refused(changes: dict[str, Any], here: list[int], reason: str, final: bool) -> None:
    answer = judged(ZERO, asdict(ONE) | changes, here)
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert answer.remedy
    assert answer.final == final


@pytest.mark.parametrize("changes", [{}, {"processes": 8}, {"node": 2}])
def test_who_is_welcome(changes: dict[str, Any]) -> None:
    assert judged(ZERO, asdict(ONE) | changes, [0]) == replace(ONE, **changes)


@pytest.mark.parametrize("document", [None, 7, "x", [], {}, {"version": 3}, asdict(ONE) | {"node": "a"}])
def test_what_is_no_hello(document: Any) -> None:
    with pytest.raises(ValueError, match="validation error"):
        judged(ZERO, document, [])


def test_every_part_of_a_job_counts() -> None:
    before = job_hashes(Job.model_validate(SMALL))
    after = job_hashes(Job.model_validate(with_value("training.learning_rate", 0.5)))
    assert [part for part in before if before[part] != after[part]] == ["training"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((error.exit_code, error) for error in (UsageError, DataError, StorageError, Preempted)),
        *((error.exit_code, error) for error in (NotOwner, AccessDenied, JobError, NoProgress)),
        *((code, RunnerError) for code in (1, 2, 130, 137)),
    ],
)
def test_a_node_ends_as_node_0(code: int, kind: type[RunnerError]) -> None:
    end = finished(code, "the reason")
    assert type(end) is kind
    assert "the reason" in str(end)
    assert finished(0, None) == 0


# --- strangers ---


@pytest.fixture
def leader() -> Iterator[Leader]:
    with Leader(replace(ZERO, nodes=2), 0, lambda: None, PULSE) as leader:
        yield leader


def heard(leader: Leader, say: str) -> Said:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for said in leader.received():
            if said.message["say"] == say:
                return said
        time.sleep(0.01)
    raise AssertionError(f"{say} was not heard")


def node(leader: Leader) -> Uplink:
    return Uplink(replace(ONE, nodes=2), "127.0.0.1", leader.port, lambda: None, 20.0, PULSE)


def joins(leader: Leader) -> None:
    with node(leader):
        assert heard(leader, "joined").node == 1
        assert leader.missing == []
        assert leader.processes == [2, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "it sent what is no message: 'GET / HTTP/1.1"),
        (bytes(range(256)) + b"\n", "it sent what is no message"),
        (b"[" * 5000 + b"\n", "it sent what is no message"),
        (b'{"say": "hello"}\n', "it sent what is no message"),
        (b'{"say": "hello", "hello": {"run": 3}}\n', "it said something else than hello"),
        (b'{"say": "ready", "attempt": 1}\n', "it said something else than hello"),
        (b"x" * (LONGEST_HELLO + 2), f"it sent a line of more than {LONGEST_HELLO} bytes"),
    ],
)
def test_garbage_of_a_stranger_is_dropped_and_said(leader: Leader, content: bytes, reason: str) -> None:
    with socket.create_connection(("127.0.0.1", leader.port)) as stranger:
        stranger.sendall(content)
        said = heard(leader, "stranger")
        assert said.node is None
        assert said.message["address"] == "127.0.0.1"
        assert said.message["reason"].startswith(reason)
        stranger.settimeout(10)
        assert _closed(stranger)
    joins(leader)


def _closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_silent_strangers_do_not_keep_a_node_out(leader: Leader) -> None:
    strangers = [socket.create_connection(("127.0.0.1", leader.port)) for _ in range(STRANGERS + 2)]
    joins(leader)
    strangers[0].settimeout(2)
    assert _closed(strangers[0])  # the oldest, for one more
    for stranger in strangers:
        stranger.close()


def test_a_probe_of_the_port_is_said_once(leader: Leader) -> None:
    for _ in range(3):
        socket.create_connection(("127.0.0.1", leader.port)).close()
    joins(leader)
    assert [said for said in leader.received() if said.message["say"] == "stranger"] == []


def test_a_node_that_says_nonsense_is_lost(leader: Leader) -> None:
    with socket.create_connection(("127.0.0.1", leader.port)) as sock:
        hello = {"say": "hello", "hello": asdict(replace(ONE, nodes=2))}
        sock.sendall(json.dumps(hello).encode() + b"\n")
        assert heard(leader, "joined").node == 1
        sock.sendall(b"nonsense\n")
        assert "no message" in heard(leader, "lost").message["reason"]
        assert leader.missing == [1]


# --- waiting ---


def test_who_does_not_come_is_named(leader: Leader) -> None:
    pauses: list[None] = []

    def pause() -> None:
        pauses.append(None)
        time.sleep(0.01)

    with pytest.raises(RunnerError, match=r"after 0.1 s node 1 of 2 had not connected to port \d+ of node 0"):
        leader.gather(pause, 0.1)
    assert pauses
    with node(leader):
        leader.gather(pause)
        assert [said.message["say"] for said in leader.received()] == ["joined"]


def test_what_pausing_raises_ends_the_wait(leader: Leader) -> None:
    def pause() -> None:
        raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        leader.gather(pause)


def test_a_port_in_use_is_named(leader: Leader) -> None:
    with pytest.raises(
        RunnerError, match=rf"listen on port {leader.port} .*in use.*; remedy: .*RUNNER_LEADER"
    ):
        Leader(ZERO, leader.port, lambda: None)


def test_a_long_message_arrives_whole_and_last_words_too(leader: Leader) -> None:
    text = "long " * 300_000
    with node(leader) as uplink:
        heard(leader, "joined")
        uplink.send({"say": "notice", "reason": text})
        uplink.send({"say": "ended", "attempt": 1, "exit": "last", "outcome": None})
    assert heard(leader, "notice").message["reason"] == text
    leader.received()


# --- silence ---


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            yield here, there


def test_silence_is_lost_after_30_seconds(sockets: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    connection = Connection(sockets[0], Pulse(), clock=clock)
    for _ in range(29):
        clock.now += 1
        connection.tick()
    clock.now += 1
    with pytest.raises(Lost, match="nothing was heard of it for 30 s"):
        connection.tick()


def test_a_word_ends_silence_and_sleep_is_none(sockets: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    connection = Connection(sockets[0], Pulse(), clock=clock)
    for _ in range(4):
        clock.now += 3600  # a laptop that slept has not listened
        connection.tick()
    sockets[1].sendall(b'{"say": "beat"}\n{"say": "rea')
    assert connection.receive() == []
    for _ in range(5):
        clock.now += 5
        connection.tick()
    sockets[1].sendall(b'dy", "attempt": 3}\n')
    assert connection.receive() == [{"say": "ready", "attempt": 3}]


def test_last_words_arrive_beside_unread_ones(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A socket that is closed with unread bytes resets its connection, and may take from the other what it
    was sent."""
    sockets[1].sendall(b'{"say": "beat"}\n')
    connection = Connection(sockets[0], PULSE)
    connection.send({"say": "progress", "step": 4})
    connection.finish()  # too early: not all is sent
    connection.flush()
    connection.finish()
    assert sockets[1].recv(100) == b'{"say": "progress", "step": 4}\n'
    assert sockets[1].recv(100) == b""
    sockets[1].sendall(b'{"say": "beat"}\n')


def test_beats_are_sent_while_nothing_is_said(sockets: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    connection = Connection(sockets[0], Pulse(), clock=clock)
    for now, sent in ((4, False), (5, True), (9, False), (10, True)):
        clock.now = now
        connection.beat()
        assert connection.pending == sent
        connection.flush()
    assert sockets[1].recv(100) == b'{"say": "beat"}\n' * 2
