"""Nodes as processes, which tests talk to over a connection of their own: JSON, one object at a time.

`python -m tests.node FD` forks them as a test asks for them: importing takes longer than what they do.

Node 0 sends what a test gives it, and ends when the test closes the connection; it tells what it hears. Any
other node follows it as the runner does, with a rank that is a line of Python, and nothing to fetch.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runner.errors import DataError, RunnerError
from runner.manifest import Job
from runner.plan import Fetched, Plan
from runner.supervisor.fetch import Answer, Request
from runner.supervisor.follow import Follower, GroupEnd, pause
from runner.supervisor.hello import Hello, job_hashes
from runner.supervisor.link import Leader
from runner.supervisor.notices import Notices
from runner.supervisor.order import Share
from runner.supervisor.ranks import Child, watch
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.uplink import Uplink
from runner.supervisor.verdict import Outcome
from runner.supervisor.wire import Pulse
from tests.small_job import SMALL

PULSE = Pulse(beat=0.2, silence=3.0)


Say = Callable[..., None]
"""Tells the test."""


def hello(asked: dict[str, Any]) -> Hello:
    job = Job.model_validate(SMALL | asked.get("job", {}))
    return Hello(run=job.name, node=asked["node"], nodes=asked["nodes"], processes=2, job=job_hashes(job))


def lead(asked: dict[str, Any], test: Connection, say: Say) -> None:
    with Notices() as notices, Leader(hello(asked), asked["port"], notices.wake, PULSE) as leader:
        say(port=leader.port)
        while True:
            ready, _, _ = select.select([notices.wakeup, test.fileno()], [], [], 1.0)
            if notices.wakeup in ready:
                pause(notices)
            for said in leader.received():
                say(node=said.node, missing=leader.missing, **said.message)
            if test.fileno() in ready:
                try:
                    leader.send(json.loads(test.recv_bytes()))
                except EOFError:
                    return


def rank(asked: dict[str, Any], notices: Notices, say: Say) -> Callable[..., GroupEnd]:
    def run_group(
        plan: Plan, share: Share, look: Callable[[], str | None], on_notice: Callable[[str], bool]
    ) -> GroupEnd:
        def began(event: dict[str, Any]) -> None:
            say(
                rank=event["pid"],
                first_rank=share.first_rank,
                run_dir=str(plan.run_dir),
                attempt=plan.attempt,
            )

        source = (
            "import json, os, signal; "
            "os.write(int(os.environ['RUNNER_EVENTS_FD']), "
            "json.dumps({'event': 'rank', 'pid': os.getpid()}).encode() + b'\\n'); " + asked["rank"]
        )
        exit = watch(
            [Child([sys.executable, "-c", source], os.environ, plan.attempt_dir / "log")],
            notices=notices,
            on_event=began,
            on_notice=on_notice,
            on_tick=look,
        )
        done = Outcome(outcome="done", exit_code=0) if exit.returncode == 0 else None
        return GroupEnd(str(exit), done)

    return run_group


def fetcher(asked: dict[str, Any], say: Say) -> Callable[..., Answer]:
    def fetched(request: Request, look: Callable[[], str | None]) -> Answer:
        say(fetch=request.pins)
        if "fetch" in asked:
            raise DataError(asked["fetch"])
        found = Fetched(model="/here/model", train=["/here/rows"], eval=[])
        return Answer(fetched=found, pins=request.pins, fingerprints={"rows.jsonl": "abc"})

    return fetched


def node(asked: dict[str, Any], test: Connection) -> int:
    """One node. Returns its exit code."""

    def say(**what: Any) -> None:
        test.send_bytes(json.dumps(what).encode())

    try:
        if asked["node"] != 0:
            return follower(asked, say)
        lead(asked, test, say)
        return 0
    except RunnerError as error:
        say(error=str(error))
        return error.exit_code


def follower(asked: dict[str, Any], say: Say) -> int:
    folder = RunFolder(Path(asked["folder"], "nodes", str(asked["node"])))
    with (
        Notices() as notices,
        Uplink(hello(asked), "127.0.0.1", asked["port"], notices.wake, asked["patience"], PULSE) as uplink,
    ):
        say(begun=True)
        return Follower(
            asked["node"],
            uplink,
            notices,
            folder,
            fetched=fetcher(asked, say),
            run_group=rank(asked, notices, say),
            line=lambda text: say(line=text),
        ).run()


def forge(control: socket.socket) -> None:
    """Fork nodes until the test is gone.

    test     {"node": ...} and a connection    start a node and talk to it there     -> its process
             {"wait": process}                 wait for its end                      -> its exit code
    """
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not data:
            return
        asked = json.loads(data)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        elif answer := os.fork():
            os.close(fds[0])
        else:
            control.close()
            code = 70
            try:
                code = node(asked, Connection(fds[0]))
            except:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)
        control.send(json.dumps(answer).encode())


if __name__ == "__main__":
    forge(socket.socket(fileno=int(sys.argv[1])))
