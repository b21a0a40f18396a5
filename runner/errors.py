"""Every way a run can end, as exceptions that carry the exit code.

    RunnerError            1   crash: the trainer died, or a defect of ours (counted by orchestrators)
    ├── OutOfMemory        1   a trainer's micro-batch does not fit; its supervisor knows what follows
    ├── UsageError        64   the command line is wrong
    ├── DataError         65   a dataset, a model folder or a checkpoint is not what the job says
    ├── StorageError      74   disk, store or network, after patience (retried by orchestrators)
    ├── Preempted         75   stopped by a notice; state is saved, the same command goes on
    ├── NotOwner          76   another supervisor owns this run
    ├── AccessDenied      77   credentials or rights are missing or wrong
    ├── JobError          78   the job is wrong; carries every problem that was found
    └── NoProgress        93   the same step failed twice

This module imports nothing of the package. `runner.cli` is the one place that catches, prints one
message and exits; foreign exceptions are mapped where the foreign call is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class RunnerError(Exception):
    """A run that ended. The message says what was tried, on what, why it failed and the remedy."""

    exit_code: ClassVar[int] = 1
    outcome: ClassVar[str] = "failed"
    """The word that `result.json` and the events use."""
    kept: tuple[int, str | None] | None = None
    """Newest step that is committed, and the id of its checkpoint, of a run that this process owned."""


class OutOfMemory(RunnerError):
    """A trainer's micro-batch does not fit, and a smaller one may: for its supervisor, never a run's end."""

    outcome = "out_of_memory"


class UsageError(RunnerError):
    """The command line is wrong."""

    exit_code = 64


class DataError(RunnerError):
    """A dataset, a model folder or a checkpoint is not what the job says."""

    exit_code = 65


class StorageError(RunnerError):
    """A disk, a store or the network failed, and waiting did not help."""

    exit_code = 74


class Preempted(RunnerError):
    """The run was asked to stop. Its state is saved; the same command goes on."""

    exit_code = 75
    outcome = "preempted"


class NotOwner(RunnerError):
    """Another supervisor owns this run, on this machine or another."""

    exit_code = 76


class AccessDenied(RunnerError):
    """Credentials or rights are missing or wrong. Never read as "nothing is there"."""

    exit_code = 77


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a job."""

    path: str
    """Dotted key, `datasets.train[0].split`; empty for the whole document."""
    reason: str
    """Why the value is refused, with the value."""
    remedy: str
    """What to write instead."""
    where: str = ""
    """`file:line:column`, or the source's own name: `environment JOB__LORA__R`, `command line lora.r=0`."""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        key = f"{self.path}: " if self.path else ""
        return f"{place}{key}{self.reason}\n    remedy: {self.remedy}"


class JobError(RunnerError):
    """The job is wrong. All problems at once."""

    exit_code = 78

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class NoProgress(RunnerError):
    """The same step failed twice."""

    exit_code = 93
