"""Node 0 and a node that follows it, as two commands with fake ranks: what ends an attempt, and what a run.

Real trainers are in tests/test_two_nodes.py, the links alone in tests/test_nodes.py.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Preempted, RunnerError
from runner.manifest import Job
from runner.plan import Fetched, Plan, geometry
from runner.supervisor.attempt import Ended
from runner.supervisor.follow import GroupEnd
from runner.supervisor.hello import Hello, job_hashes
from runner.supervisor.identity import Identity
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import Exit
from runner.supervisor.seen import Seen
from runner.supervisor.team import Team, together
from runner.supervisor.uplink import Uplink
from runner.supervisor.verdict import Outcome
from runner.topology import Topology
from tests.machines import Bench, Command
from tests.small_job import SMALL

# --- how an attempt ended ---

DONE = Outcome(outcome="done", exit_code=0)
LOST = Outcome(outcome="failed", exit_code=1, error="RuntimeError: Connection closed by peer")
FULL = Outcome(outcome="out_of_memory", exit_code=1, error="it does not fit")
DATA = Outcome(outcome="failed", exit_code=65, error="row 3 is bad")
STOPPED = Outcome(outcome="preempted", exit_code=75, error="stopped at step 2")
KILLED = "node 1: SIGKILL"
GONE = "the loss of node 1: it broke"


@pytest.mark.parametrize(
    ("exit", "own", "other", "why", "told", "outcome", "reason"),
    [
        (Exit(0), DONE, GroupEnd("exit code 0", DONE), None, None, "done", "exit code 0"),
        (Exit(75), STOPPED, None, GONE, GONE, "preempted", "stopped at step 2"),
        (Exit(65), DATA, GroupEnd("row 3 is bad", None), "w", "row 3 is bad", "failed", "row 3 is bad"),
        (
            Exit(1),
            LOST,
            GroupEnd("it does not fit", FULL),
            "w",
            None,
            "out_of_memory",
            "node 1: it does not fit",
        ),
        (Exit(-9, "w"), None, GroupEnd("row 3 is bad", DATA), "w", None, "failed", "node 1: row 3 is bad"),
        (Exit(0), DONE, GroupEnd("SIGKILL", None), KILLED, None, None, KILLED),
        (Exit(0), DONE, None, GONE, None, None, GONE),
        (Exit(1), LOST, GroupEnd("SIGKILL", None), KILLED, "c", None, f"{LOST.error}; {KILLED}"),
        (Exit(-9), None, GroupEnd("SIGKILL", None), KILLED, "SIGKILL", None, "SIGKILL, often"),
        (Exit(-9, KILLED), None, GroupEnd("SIGKILL", None), KILLED, None, None, KILLED),
    ],
)
def test_the_end_of_all_nodes(
    tmp_path: Path,
    exit: Exit,
    own: Outcome | None,
    other: GroupEnd | None,
    why: str | None,
    told: str | None,
    outcome: str | None,
    reason: str,
) -> None:
    log = tmp_path / "log"
    log.touch()
    ended = Ended(exit, own, Seen(), log)
    found = together(ended, {} if other is None else {1: other}, why, told)
    assert (None if found.outcome is None else found.outcome.outcome) == outcome
    assert found.reason.startswith(reason)


def test_a_notice_of_another_machine_hurries_nobody() -> None:
    now = [0.0]
    with Notices(clock=lambda: now[0]) as notices:
        notices.hear("SIGTERM on node 1")
        now[0] = 9.0
        notices.hear("SIGTERM on node 2")
        os.kill(os.getpid(), signal.SIGTERM)
        assert (notices.first, notices.hurry) == ("SIGTERM on node 1", False)
        now[0] = 18.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert notices.hurry


# --- whole runs ---


class Pair:
    """Two commands of one run; `before` is called in each, with the index of its node."""

    def __init__(
        self, bench: Bench, path: Path, before: Callable[[int], object] = lambda index: None
    ) -> None:
        self._before = before
        bench.job["launch"] = {"nodes": 2}
        self.zero = bench
        path.mkdir()
        self.one = Bench.beside(bench, path)
        self._meet = path / "meet"
        self.commands: list[Command] = []

    def start(self, *faults: dict[str, Any]) -> tuple[Command, Command]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            leader = f"127.0.0.1:{server.getsockname()[1]}"

        def node(index: int) -> Callable[[], object]:
            os_environ = {"RUNNER_NODE_RANK": str(index), "RUNNER_LEADER": leader}
            return lambda: (os.environ.update(os_environ), self._before(index))

        zero, one = (
            bench.start(*faults, before=node(index), meet=str(self._meet))
            for index, bench in enumerate((self.zero, self.one))
        )
        self.commands += [zero, one]
        return zero, one

    def train(self, *faults: dict[str, Any]) -> tuple[tuple[int, int], str]:
        (zero, said), (one, other) = (command.finish() for command in self.start(*faults))
        return (zero, one), f"{said}\nnode 1:\n{other}"


@pytest.fixture
def pair(bench: Bench, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(bench, tmp_path / "other")
    yield pair
    for command in pair.commands:
        if command.poll() is None:
            command.send(signal.SIGKILL)


def at(place: str, how: str, **more: Any) -> dict[str, Any]:
    return {"at": place, "how": how, "rank": 1, "attempt": 1, **more}


def test_a_crash_on_another_node_is_one_of_the_attempt(pair: Pair, undisturbed: str) -> None:
    codes, output = pair.train(at("step:4", "exit"))
    assert codes == (0, 0), output
    assert pair.zero.weights() == undisturbed
    (restart,) = pair.zero.result()["restarts"]
    assert restart["reason"] == "node 1: exit code 3: RuntimeError: no luck"
    assert restart["step"] == 2
    assert pair.zero.result()["fidelity"] == "exact"
    assert sorted(path.name for path in (pair.one.run / "nodes" / "1" / "attempts").iterdir()) == ["1", "2"]
    codes, output = pair.train()
    assert codes == (0, 0), output
    assert "is done already" in output


def test_a_crash_of_node_0_ends_the_others_and_all_go_on(pair: Pair, undisturbed: str) -> None:
    codes, output = pair.train(at("step:4", "kill", rank=0))
    assert codes == (0, 0), output
    assert pair.zero.weights() == undisturbed
    (restart,) = pair.zero.result()["restarts"]
    assert restart["reason"].startswith("SIGKILL")


def test_memory_that_another_node_lacks_makes_all_batches_smaller(pair: Pair, undisturbed: str) -> None:
    codes, output = pair.train(at("step:4", "full", above=2))
    assert codes == (0, 0), output
    assert pair.zero.weights() == undisturbed
    (restart,) = pair.zero.result()["restarts"]
    assert restart["per_device"] == {"from": 4, "to": 2}


def test_a_decision_of_another_node_ends_all_with_its_code(pair: Pair) -> None:
    codes, output = pair.train(at("step:4", "crash:65"))
    assert codes == (65, 65), output
    assert pair.zero.result()["error"].startswith("node 1: ")


def test_a_notice_on_one_node_stops_all_with_a_commit(pair: Pair, undisturbed: str) -> None:
    zero, one = pair.start(at("step:3", "wait", rank=0))
    pair.zero.wait_for(pair.zero.waiting(), zero)
    one.send(signal.SIGTERM)
    (first, output), (second, other) = zero.finish(), one.finish()
    assert (first, second) == (75, 75), output + other
    assert "SIGTERM on node 1: stopped at step 3 of 6" in output
    assert "node 0 saves and stops the run" in other
    assert pair.zero.head().newest.step == 3
    codes, output = pair.train()
    assert codes == (0, 0), output
    assert pair.zero.weights() == undisturbed


def test_a_node_that_is_lost_before_any_commit_ends_the_other_with_1(pair: Pair) -> None:
    zero, one = pair.start(at("step:1", "linger"))
    attempt = pair.one.run / "nodes" / "1" / "attempts" / "1"
    pair.zero.wait_for((attempt / "waiting").exists, zero)
    one.send(signal.SIGKILL)
    code, output = zero.finish()
    assert code == 1, output
    assert "node 1 is lost: " in output and "nothing was committed" in output


@pytest.mark.parametrize(("progressed", "kind"), [(False, RunnerError), (True, Preempted)])
def test_a_node_that_comes_back_smaller_ends_the_command(
    tmp_path: Path, progressed: bool, kind: type[RunnerError]
) -> None:
    """Before the next attempt: it would be asked for ranks that it has no GPU for."""
    job = Job.model_validate(SMALL | {"launch": {"nodes": 2}})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said: list[str] = []
    deadline = time.monotonic() + 30

    def pause() -> None:
        assert time.monotonic() < deadline, said
        time.sleep(0.01)

    def until(line: str) -> None:
        while not any(one.startswith(line) for one in said):
            team.look()
            pause()

    def node(count: int) -> Uplink:
        hello = Hello(run=job.name, node=1, nodes=2, processes=count, job=job_hashes(job))
        return Uplink(hello, "127.0.0.1", port, lambda: None)

    plan = Plan(
        purpose="train",
        job=job,
        run_dir=tmp_path,
        attempt=2,
        attempt_dir=tmp_path,
        geometry=geometry(job, 4),
        fetched=Fetched(model="", train=[], eval=[]),
        save_seconds=1.0,
    )
    here = Topology(0, 2, "127.0.0.1", port, "")
    with Notices() as notices, Team(job, here, 2, notices, said.append) as team:
        with node(2):
            assert team.gather(pause) == [2]
        until("node 1 is lost")
        if progressed:
            team.progress(3)
        with node(1), pytest.raises(RunnerError, match="node 1 came back and offers 1 of 2") as ended:
            until("node 1 is here")
            team.begin(plan, Identity(job={}, pins={}, fingerprints={}, versions={}), pause)
    assert type(ended.value) is kind


def test_three_nodes_for_a_batch_of_eight_are_78_before_anything_is_done(bench: Bench) -> None:
    bench.job["launch"] = {"nodes": 3}
    code, output = bench.train()
    assert code == 78
    assert "3 nodes cannot cut a global batch of 8 evenly" in output
    assert not bench.run.exists()
