"""What follows when a trainer has ended: done, another attempt, or the end of the run. Pure.

The trainer's `outcome.json` decides, not its exit code; a trainer that left none has crashed, or was killed
for the memory that it used (`runner.supervisor.cgroup`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runner.errors import (
    AccessDenied,
    DataError,
    JobError,
    NoProgress,
    Preempted,
    Problem,
    RunnerError,
    StorageError,
)
from runner.manifest import Job
from runner.plan import Geometry, smaller

RESTARTS_WITHOUT_PROGRESS = 5

_BY_CODE: dict[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (DataError, StorageError, AccessDenied, NoProgress)
}


class Outcome(BaseModel):
    """A trainer's last word. Only the first two are always there."""

    model_config = ConfigDict(frozen=True)

    outcome: str
    exit_code: int
    error: str | None = None
    step: int | None = None
    metrics: dict[str, Any] = {}
    adapter: str | None = None
    best: dict[str, Any] | None = None
    stopped_early: bool = False
    facts: dict[str, Any] = {}


@dataclass(frozen=True)
class Crash:
    """One attempt that ended without finishing, and not by a decision of its own."""

    attempt: int
    step: int | None
    """The optimizer step at work, from 1; None outside training."""
    reason: str
    """`SIGKILL`, `exit code 1: RuntimeError: ...`."""
    progressed: bool
    """A checkpoint was committed in this attempt."""
    by_signal: bool
    rows: tuple[int, ...] = ()
    """Rows of the step at work, if the trainer said them."""


@dataclass(frozen=True)
class Restart:
    """Go on from the newest checkpoint."""

    reason: str
    sizes: dict[str, int] | None = None
    """After an out of memory the per-device size, `{"from": 8, "to": 4}`."""
    after: Literal["trainer", "notice", "lost", "failure"] = "trainer"
    """What ended: a trainer; or a whole command, by a notice, without a word, or by a failure."""


@dataclass
class History:
    """The crashes since the last progress, newest last; that of an attempt with progress is the first."""

    crashes: list[Crash] = field(default_factory=list)

    def decide(self, crash: Crash) -> Restart:
        """Judge one more crash.

            progress    same step   crashes without    before a step, same     verdict
            made        as before   progress so far    reason, no signal
            yes         -           -                  -                       restart
            no          yes         -                  -                       NoProgress 93, with the rows
            no          no          -                  yes                     RunnerError 1
            no          no          0 to 4             no                      restart
            no          no          5                  no                      RunnerError 1

        Returns:
            The restart.

        Raises:
            NoProgress, RunnerError: as the table says.
        """
        if crash.progressed:
            self.crashes = [crash]
            return Restart(crash.reason)
        last = self.crashes[-1] if self.crashes else None
        without = sum(not one.progressed for one in self.crashes)
        self.crashes.append(crash)
        if last is not None and crash.step is not None and crash.step == last.step:
            raise NoProgress(
                f"step {crash.step} failed twice, in attempts {last.attempt} and {crash.attempt}, the second "
                f"time with {crash.reason}; {_rows(crash)}; remedy: look at these rows and at the log, then "
                "give the same command again"
            )
        if (
            last is not None
            and crash.step is None
            and last.step is None
            and not crash.by_signal
            and crash.reason == last.reason
        ):
            both = f"attempts {last.attempt} and {crash.attempt}"
            raise RunnerError(f"{both} failed outside training with {crash.reason}")
        if without >= RESTARTS_WITHOUT_PROGRESS:
            raise RunnerError(
                f"{without + 1} attempts in a row ended without a new checkpoint, the last with "
                f"{crash.reason}; remedy: look at the log; a lower checkpoints.max_loss saves sooner"
            )
        return Restart(crash.reason)


def smaller_batch(job: Job, cut: Geometry, place: str, reason: str) -> Geometry:
    """What follows when a micro-batch did not fit: the next smaller one, from the newest checkpoint.

        loss                   per_device    answer
        any but aot*           above 1       the next smaller size that cuts the same global batch
        any but aot*           1             RunnerError 1, with what to change
        aot, aot_unpaired      any           RunnerError 1: another size would be another loss

    No such restart counts as one without progress: each makes the size smaller, so that they end.

    Args:
        place: where the trainer was, `in step 7`.
        reason: how it ended.
    """
    levers = "; ".join(memory_levers(job))
    if job.training.sorts:
        raise RunnerError(
            f"{place}: {cut.per_device} pairs do not fit the memory ({reason}), and fewer at once would be "
            f"another loss, because {job.training.options['loss_type']} sorts them. Remedy, the largest "
            f"lever first: {levers}; or another name with a smaller training.per_device_train_batch_size"
        )
    less = smaller(cut)
    if less is None:
        raise RunnerError(
            f"{place}: a micro-batch of a single row does not fit the memory ({reason}). Remedy, the largest "
            f"lever first: {levers}"
        )
    return less


def memory_levers(job: Job) -> list[str]:
    """What of a job can be changed so that one row fits, the largest saving first, without what is in force.

    The order is that of the usual sizes: weights with their gradients and moments, then weights, then
    activations, then what is left.
    """
    quantization = job.quantization or {}
    rungs = [
        (job.lora is None, "a lora section: full fine-tuning needs gradients and moments for every weight"),
        (job.model.dtype == "float32", "model.dtype: bfloat16"),
        (job.lora is not None and not quantization.get("load_in_4bit"), "quantization: {load_in_4bit: true}"),
        (
            job.training.options.get("gradient_checkpointing") is False,
            "training.gradient_checkpointing: true",
        ),
        (True, "smaller images through model.processor (for Idefics3: size: {longest_edge: ...})"),
        (True, "datasets.max_length with datasets.on_overflow: drop or resize"),
        (
            bool(set(job.model.freeze) ^ {"vision_tower", "projector"}),
            "model.freeze: [vision_tower, projector]",
        ),
        (True, "a device with more memory"),
    ]
    return [lever for is_open, lever in rungs if is_open]


def _rows(crash: Crash) -> str:
    if not crash.rows:
        return "its rows are not known, because the trainer ended before it named them"
    return f"its rows of the prepared training data, counted from 0, are {', '.join(map(str, crash.rows))}"


def final_error(outcome: Outcome) -> RunnerError | None:
    """The exception of an outcome that ends the run whatever else happened; None if it may go on, or is done.

    outcome         exit_code          answer
    done            0                  None
    preempted       75                 Preempted
    failed          65, 74, 77, 93     DataError, StorageError, AccessDenied, NoProgress
    failed          78                 JobError
    failed          1, any other       None: it counts as a crash
    out_of_memory   1                  None: `smaller_batch` decides
    """
    message = outcome.error or f"the trainer ended as {outcome.outcome} and said no reason"
    if outcome.outcome == Preempted.outcome:
        return Preempted(message)
    if outcome.outcome == "done":
        return None
    if outcome.exit_code == JobError.exit_code:
        # The message of a JobError is made of problems already.
        reason, _, remedy = message.partition("\n    remedy: ")
        return JobError([Problem("", reason, remedy or "change the job as said and give the command again")])
    kind = _BY_CODE.get(outcome.exit_code)
    return None if kind is None else kind(message)
