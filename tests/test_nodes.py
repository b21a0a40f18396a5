"""Nodes as processes of this machine, over real sockets: they meet, work, die, stop and are asked to stop."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from runner.manifest import Job
from runner.plan import Fetched, Geometry, Plan
from runner.supervisor.order import Order
from tests.small_job import SMALL

ROOT = Path(__file__).parents[1]
PAUSE = "signal.pause()"


class Forge:
    """The process that all nodes of this file are forked from."""

    def __init__(self) -> None:
        self._control, there = socket.socketpair()
        with there:
            os.set_inheritable(there.fileno(), True)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.node", str(there.fileno())], cwd=ROOT, pass_fds=[there.fileno()]
            )

    def start(self, asked: dict[str, Any], connection: Connection) -> int:
        socket.send_fds(self._control, [json.dumps(asked).encode()], [connection.fileno()])
        return int(self._control.recv(100))

    def wait(self, process: int) -> int:
        self._control.settimeout(15)
        self._control.send(json.dumps({"wait": process}).encode())
        return int(self._control.recv(100))

    def close(self) -> None:
        self._control.close()
        self._process.wait()


class Node:
    """One process of tests/node.py, and what it tells."""

    def __init__(self, forge: Forge, folder: Path, **asked: Any) -> None:
        asked = {"nodes": 2, "port": 0, "folder": str(folder), "rank": PAUSE, "patience": 30.0} | asked
        self._connection, there = multiprocessing.Pipe()
        with there:
            self.pid = forge.start(asked, there)
        self._forge = forge
        self._code: int | None = None

    def hear(self, key: str, value: Any = None) -> dict[str, Any]:
        """The next that it tells with a key, and a value if one is given."""
        while True:
            assert self._connection.poll(15), f"it does not say {key} {value}"
            said: dict[str, Any] = json.loads(self._connection.recv_bytes())
            if key in said and value in (None, said[key]):
                return said

    def send(self, **message: Any) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int:
        """Ask node 0 to end."""
        self._connection.close()
        return self.ends()

    def ends(self) -> int:
        """Its exit code, once it has ended by itself."""
        if self._code is None:
            self._code = self._forge.wait(self.pid)
        return self._code

    def close(self) -> None:
        self._connection.close()
        if self._code is None:
            self.kill(signal.SIGKILL)
            self.ends()


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture
def start(forge: Forge, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(**asked: Any) -> Node:
        nodes.append(Node(forge, tmp_path, **asked))
        return nodes[-1]

    yield make
    for one in nodes:
        one.close()


@pytest.fixture
def pair(start: Callable[..., Node]) -> tuple[Node, Node]:
    """Node 0, and one that follows it."""
    leader = start(node=0)
    follower = start(node=1, port=leader.hear("port")["port"])
    assert leader.hear("say", "joined")["node"] == 1
    return leader, follower


def order(attempt: int, **changes: Any) -> dict[str, Any]:
    there = Path("/there/runs/small")
    plan = Plan(
        purpose="train",
        job=Job.model_validate(SMALL),
        run_dir=there,
        attempt=attempt,
        attempt_dir=there / "attempts" / str(attempt),
        geometry=Geometry(global_batch_size=4, per_device=1, accumulation=1, world=4),
        fetched=Fetched(model="/there/model", train=["/there/rows"], eval=[]),
        restore=there / "newest" / "1",
        save_seconds=60,
    )
    asked = {
        "pins": {"model a@main": "c0ffee"},
        "fingerprints": {"rows.jsonl": "abc"},
        "processes": [2, 2, 2],
    }
    return Order(attempt=attempt, plan=plan, address="127.0.0.1", port=7, **asked | changes).message()


def run(leader: Node, *followers: Node, attempt: int = 1) -> list[int]:
    """Start an attempt; returns the processes of its ranks."""
    leader.send(**order(attempt))
    for _ in followers:
        assert leader.hear("say", "ready")["attempt"] == attempt
    leader.send(say="start", attempt=attempt)
    return [follower.hear("rank")["rank"] for follower in followers]


def gone(pid: int) -> bool:
    """Whether a process that is not our child is gone, or soon is."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_three_nodes_meet_work_and_end(start: Callable[..., Node], tmp_path: Path) -> None:
    leader = start(node=0, nodes=3)
    port = leader.hear("port")["port"]
    followers = [start(node=index, nodes=3, port=port, rank="pass") for index in (1, 2)]
    assert len(leader.hear("say", "joined")["missing"]) == 1
    joined = leader.hear("say", "joined")
    assert (joined["missing"], joined["processes"], joined["address"]) == ([], 2, "127.0.0.1")
    for attempt in (1, 2):
        leader.send(**order(attempt))
        assert {leader.hear("say", "ready")["node"] for _ in followers} == {1, 2}
        leader.send(say="start", attempt=attempt)
        for index, follower in enumerate(followers, start=1):
            if attempt == 1:
                assert follower.hear("fetch")["fetch"] == {"model a@main": "c0ffee"}
            began = follower.hear("rank")
            assert (began["attempt"], began["first_rank"]) == (attempt, 2 * index)
            assert began["run_dir"] == str(tmp_path / "nodes" / str(index))
        for _ in followers:
            ended = leader.hear("say", "ended")
            assert (ended["attempt"], ended["exit"]) == (attempt, "exit code 0")
            assert ended["outcome"]["outcome"] == "done"
    leader.send(say="finished", outcome="done", exit_code=0, error=None)
    assert leader.stop() == 0
    assert [follower.ends() for follower in followers] == [0, 0]


def test_a_killed_node_is_noticed_and_its_successor_joins(start: Callable[..., Node]) -> None:
    leader = start(node=0)
    port = leader.hear("port")["port"]
    first = start(node=1, port=port)
    leader.hear("say", "joined")
    second = start(node=1, port=port)  # as one comes that replaces a node that is not known to be dead
    assert "another node 1" in leader.hear("say", "stranger")["reason"]
    [rank] = run(leader, first)
    began = time.monotonic()
    first.kill(signal.SIGKILL)
    lost = leader.hear("say", "lost")
    assert (lost["node"], lost["missing"], lost["reason"]) == (1, [1], "the connection was closed")
    assert time.monotonic() - began < 2
    assert gone(rank)
    assert leader.hear("say", "joined")["missing"] == []
    run(leader, second, attempt=2)


@pytest.mark.parametrize(("progressed", "code"), [(False, 1), (True, 75)])
def test_without_node_0_a_node_kills_its_ranks_and_ends(
    pair: tuple[Node, Node], progressed: bool, code: int
) -> None:
    leader, follower = pair
    if progressed:
        leader.send(say="progress", step=4)
    [rank] = run(leader, follower)
    began = time.monotonic()
    leader.kill(signal.SIGKILL)
    assert "node 0 at 127.0.0.1 port" in follower.hear("error")["error"]
    assert follower.ends() == code
    assert time.monotonic() - began < 3
    assert gone(rank)


def test_a_node_that_stands_still_is_lost_to_the_other(start: Callable[..., Node]) -> None:
    leader = start(node=0, nodes=3)
    port = leader.hear("port")["port"]
    still, follower = (start(node=index, nodes=3, port=port) for index in (1, 2))
    for _ in range(2):
        leader.hear("say", "joined")
    still.kill(signal.SIGSTOP)
    lost = leader.hear("say", "lost")
    assert (lost["node"], lost["reason"]) == (1, "nothing was heard of it for 3 s")
    assert lost["missing"] == [1]
    leader.kill(signal.SIGSTOP)
    assert "nothing was heard of it for 3 s" in follower.hear("error")["error"]
    assert follower.ends() == 1
    still.kill(signal.SIGCONT)  # it finds its connection closed
    assert "node 0" in still.hear("error")["error"]
    assert still.ends() == 1


def test_another_job_is_refused_and_ends_with_78(start: Callable[..., Node]) -> None:
    leader = start(node=0)
    follower = start(node=1, port=leader.hear("port")["port"], job={"seed": 7, "lora": {"r": 2}})
    error = follower.hear("error")["error"]
    assert "the job of this node differs from that of node 0 in lora, seed" in error
    assert "remedy: give every node the same file" in error
    assert follower.ends() == 78
    assert "differs" in leader.hear("say", "stranger")["reason"]
    assert leader.stop() == 0


def test_nodes_may_come_before_node_0_and_outlive_none(start: Callable[..., Node]) -> None:
    first = start(node=0)
    port = first.hear("port")["port"]
    old = start(node=1, port=port)
    first.hear("say", "joined")
    first.kill(signal.SIGKILL)
    assert first.ends() == -signal.SIGKILL
    assert old.ends() == 1
    early = start(node=1, port=port)
    time.sleep(1)  # it tries, and nobody listens
    second = start(node=0, port=port)
    assert second.hear("say", "joined")["node"] == 1
    run(second, early)


def test_a_node_that_finds_no_node_0_ends(start: Callable[..., Node]) -> None:
    leader = start(node=0)
    port = leader.hear("port")["port"]
    assert leader.stop() == 0
    follower = start(node=1, port=port, patience=0.2)
    error = follower.hear("error")["error"]
    assert f"connect to node 0 at 127.0.0.1 port {port}: Connection refused" in error
    assert follower.ends() == 1


def test_a_notice_before_node_0_has_answered_ends_a_node(start: Callable[..., Node]) -> None:
    leader = start(node=0)
    port = leader.hear("port")["port"]
    assert leader.stop() == 0
    follower = start(node=1, port=port)
    follower.hear("begun")
    follower.kill(signal.SIGTERM)
    assert "SIGTERM: before node 0" in follower.hear("error")["error"]
    assert follower.ends() == 75


def test_a_notice_goes_to_node_0_and_the_ranks_go_on_until_the_end(pair: tuple[Node, Node]) -> None:
    leader, follower = pair
    [rank] = run(leader, follower)
    follower.kill(signal.SIGTERM)
    assert leader.hear("say", "notice")["reason"] == "SIGTERM on node 1"
    os.kill(rank, 0)
    leader.send(say="finished", outcome="preempted", exit_code=75, error="step 4 is committed")
    assert "step 4 is committed" in follower.hear("error")["error"]
    assert follower.ends() == 75
    assert gone(rank)


def test_a_second_notice_stops_a_node_at_once(pair: tuple[Node, Node]) -> None:
    leader, follower = pair
    [rank] = run(leader, follower)
    follower.kill(signal.SIGTERM)
    leader.hear("say", "notice")
    time.sleep(0.6)  # nearer ones count as one (`Notices`)
    follower.kill(signal.SIGTERM)
    assert follower.ends() == 75
    assert gone(rank)
    assert leader.hear("say", "ended")["outcome"] is None


def test_end_kills_the_ranks_and_the_next_attempt_runs(pair: tuple[Node, Node]) -> None:
    leader, follower = pair
    [rank] = run(leader, follower)
    leader.send(say="end", attempt=1, reason="node 2 is lost")
    assert leader.hear("say", "ended")["exit"] == "SIGKILL by its supervisor: node 2 is lost"
    assert gone(rank)
    run(leader, follower, attempt=2)
    leader.send(say="end", attempt=1, reason="said too late")
    time.sleep(0.3)  # so that they do not come at once
    leader.send(say="end", attempt=2, reason="no")
    assert leader.hear("say", "ended")["exit"] == "SIGKILL by its supervisor: no"
    run(leader, follower, attempt=3)
    leader.send(**order(4))
    assert leader.hear("say", "ended")["exit"].endswith("node 0 asks for another attempt")
    assert leader.hear("say", "ready")["attempt"] == 4
    leader.send(say="start", attempt=4)
    rank = follower.hear("rank")["rank"]
    assert leader.stop() == 0
    assert follower.ends() == 1
    assert gone(rank)


def test_what_cannot_be_fetched_is_reported_with_its_exit_code(start: Callable[..., Node]) -> None:
    leader = start(node=0)
    follower = start(node=1, port=leader.hear("port")["port"], fetch="rows.jsonl: it is not there")
    leader.hear("say", "joined")
    leader.send(**order(1))
    ended = leader.hear("say", "ended")
    assert (ended["outcome"]["exit_code"], ended["exit"]) == (65, "rows.jsonl: it is not there")
    leader.send(say="finished", outcome="failed", exit_code=65, error="as node 1 said")
    assert follower.ends() == 65


def test_other_local_files_than_those_of_node_0_are_reported(pair: tuple[Node, Node]) -> None:
    leader, _ = pair
    leader.send(**order(1, fingerprints={"rows.jsonl": "other"}))
    ended = leader.hear("say", "ended")
    assert ended["outcome"]["exit_code"] == 65
    assert "node 1 has other content than node 0 in rows.jsonl" in ended["exit"]
