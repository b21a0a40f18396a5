"""The command of a node that follows node 0: `follow`, with the runner's own way to fetch and to train.

It has no hold on the run: no store, no custody, no verdict. What it keeps lies in a folder of its own,
`runs/<name>/nodes/<index>/`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.errors import OutOfMemory
from runner.health import Heart
from runner.manifest import Job
from runner.plan import Plan
from runner.supervisor import attempt, fetch
from runner.supervisor.display import Voice, display
from runner.supervisor.fetch import Answer
from runner.supervisor.fetching import fetched
from runner.supervisor.follow import Follower, GroupEnd, Look
from runner.supervisor.hello import Hello, job_hashes
from runner.supervisor.metadata.choose import source as metadata_source
from runner.supervisor.metadata.watch import Watch
from runner.supervisor.notices import Notices
from runner.supervisor.order import Share
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.seen import Seen
from runner.supervisor.uplink import Uplink
from runner.supervisor.verdict import Outcome
from runner.supervisor.world import Machine, processes
from runner.topology import Topology


def member(
    job: Job, run: Path, here: Topology, machine: Machine, trainer: Sequence[str], voice: Voice
) -> int:
    """Follow node 0 until it ends. Returns 0: the run is done.

    Args:
        run: `runs/<name>` of this machine.
        trainer: the command that runs a plan.

    Raises:
        RunnerError: every other end, with its exit code.
    """
    hello = Hello(
        run=job.name,
        node=here.index,
        nodes=here.count,
        processes=processes(job, machine.gpus),
        job=job_hashes(job),
    )
    source = metadata_source(os.environ)
    folder = RunFolder(run / "nodes" / str(here.index))
    with (
        folder.locked(),
        Heart(folder.path) as heart,
        Notices(beat=heart.beat) as notices,
        contextlib.closing(display(voice)) as screen,
        Uplink(hello, here.address, here.port, notices.wake) as uplink,
        Watch(source, notices, lambda text: uplink.send({"say": "remark", "text": text})),
    ):
        screen.line(f"node {here.index} of {here.count} looks for {uplink}")

        def fetch_here(request: fetch.Request, look: Look) -> Answer:
            return fetched(request, folder.fetch, notices, screen.show, look)

        def run_group(plan: Plan, share: Share, look: Look, on_notice: Callable[[str], bool]) -> GroupEnd:
            screen.line(f"attempt {plan.attempt} begins; logs: {plan.attempt_dir}")
            ended = attempt.run(
                plan,
                trainer=trainer,
                environ=os.environ,
                machine=machine,
                notices=notices,
                seen=Seen(),
                on_event=lambda event: None,
                on_notice=on_notice,
                on_tick=look,
                share=share,
            )
            folder.sweep()
            screen.line(f"attempt {plan.attempt} ended {ended.seen.place} with {ended.reason}")
            outcome = ended.outcome
            if outcome is None and ended.out_of_memory:  # what only this machine can know
                full = OutOfMemory(ended.reason)
                outcome = Outcome(outcome=full.outcome, exit_code=full.exit_code, error=str(full))
            return GroupEnd(ended.reason, outcome)

        return Follower(
            here.index,
            uplink,
            notices,
            folder,
            fetched=fetch_here,
            run_group=run_group,
            line=screen.line,
        ).run()
