"""One node as a process, which tests talk to over a connection of their own: JSON, one object at a time.

Node 0 sends what a test gives it, and ends when the test closes the connection; it tells what it hears. Any
other node follows it as the runner does, with a rank that is a line of Python, and nothing to fetch.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runner.errors import DataError, RunnerError
from runner.manifest import Job
from runner.plan import Fetched, Plan
from runner.supervisor.fetch import Answer, Request
from runner.supervisor.follow import GroupEnd, Share, follow, pause
from runner.supervisor.hello import Hello, job_hashes
from runner.supervisor.link import Leader
from runner.supervisor.ranks import Notices, watch
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
            [sys.executable, "-c", source],
            environ=os.environ,
            log=plan.attempt_dir / "log",
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


def main(asked: dict[str, Any], test: Connection) -> None:
    """The process; leaves with the exit code of the node."""

    def say(**what: Any) -> None:
        test.send_bytes(json.dumps(what).encode())

    try:
        sys.exit(lead(asked, test, say) if asked["node"] == 0 else follower(asked, say))
    except RunnerError as error:
        say(error=str(error))
        sys.exit(error.exit_code)


def follower(asked: dict[str, Any], say: Say) -> int:
    folder = RunFolder(Path(asked["folder"], "nodes", str(asked["node"])))
    with (
        Notices() as notices,
        Uplink(hello(asked), "127.0.0.1", asked["port"], notices.wake, asked["patience"], PULSE) as uplink,
    ):
        return follow(
            asked["node"],
            uplink,
            notices,
            folder,
            fetched=fetcher(asked, say),
            run_group=rank(asked, notices, say),
            line=lambda text: say(line=text),
        )
