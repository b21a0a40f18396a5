"""The strategy that `launch.strategy: auto` takes on this machine, from what the job is estimated to need.

Only where there is something to choose: several GPUs of a known size. Elsewhere `runner.supervisor.world`'s
answer stands. The facts come from the process that a plan asks (`runner.supervisor.ask`), on a sample.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from runner.errors import RunnerError
from runner.facts import Question
from runner.job.matrix_strategies import splits
from runner.manifest import Job
from runner.memory import Choice, Subject, choose
from runner.memory.devices import MIB, USABLE
from runner.plan import Fetched, Geometry
from runner.supervisor.ask import ask
from runner.supervisor.notices import Notices

SAMPLE = 100
"""Rows that are looked at: the longest of them decides, and a wrong choice costs time, not the run."""

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


def capacity(command: Sequence[str] = NVIDIA_SMI) -> int | None:
    """Bytes that a process can use of the smallest GPU; None where nobody can tell."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return int(min(int(line) for line in said.splitlines() if line.strip()) * MIB * USABLE)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def chosen(
    job: Job, cut: Geometry, sources: Fetched, folder: Path, notices: Notices, has: int | None
) -> Choice | None:
    """The choice and its reason; None where there is none, or nothing is known of the job.

    Args:
        cut: how the processes cut the global batch.
        folder: for the question, the answer and the log.
        has: `capacity`.

    Raises:
        Preempted: asked to stop.
    """
    if job.launch.strategy != "auto" or cut.world == 1 or has is None:
        return None
    try:
        answer = ask(Question(job=job, fetched=sources, sample=SAMPLE), folder, notices)
    except RunnerError as error:
        if notices.first is not None:
            raise
        del error  # what is wrong with the job is told by the trainer, which names it better
        return None
    if answer.model is None or answer.data is None:
        return None
    return choose(Subject(answer.model, answer.data, job, cut, "ddp", "cuda"), has, splits(job))
