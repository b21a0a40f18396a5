"""The per-device size of a run's attempts: asked for, found by a probe, kept by a checkpoint, or smaller than
one that was too large. What follows an out of memory is decided in `runner.supervisor.verdict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.manifest import Job
from runner.plan import Geometry, geometry, recorded_size, recut, smaller
from runner.supervisor.attempt import Ended
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import Restart, smaller_batch


@dataclass
class Batch:
    """What one supervisor knows of the size; a later one has the checkpoint's record."""

    job: Job
    world: int
    """Processes that share the global batch."""
    fits: int | None = None
    """The size to train with: found, or one below a size that training ran out of memory with."""
    at_most: int | None = None
    """The largest size to probe; a probe was killed above it."""

    def start(self, record: Any) -> tuple[Geometry, bool]:
        """The cut of the next attempt, and whether the trainer shall look for one below it that fits.

            known here    checkpoint's record    asked     answer
            4             -                      -         4, no probe
            none          4                      -         4, no probe
            none          none                   2         2, no probe
            none          none                   auto      the largest up to `at_most`, probe

        A known size that does not cut the batch in this world is the next smaller one that does.

        Args:
            record: `runner.plan.batch_record` of the checkpoint that it goes on from, if any.
        """
        known = self.fits or recorded_size(self.job, record)
        if known is not None:
            return geometry(self.job, self.world, known), False
        asked = self.job.training.per_device_train_batch_size
        return geometry(self.job, self.world, self.at_most), asked == "auto"

    def note(self, seen: Seen) -> None:
        """Keep what a trainer found, so that the next attempt need not look again."""
        if seen.fits:
            self.fits = seen.per_device

    def shrink(self, cut: Geometry, ended: Ended) -> Restart:
        """Take the next smaller size after an out of memory.

        Args:
            cut: of the plan that the trainer had.

        Raises:
            RunnerError: there is none.
        """
        tried = recut(cut, ended.seen.per_device or cut.per_device)
        less = smaller_batch(self.job, tried, ended.seen.place, ended.reason).per_device
        if ended.seen.phase == "probe":
            self.at_most = less
        else:
            self.fits = less
        sizes = {"from": tried.per_device, "to": less}
        return Restart(f"out of memory {ended.seen.place}: {ended.reason}", sizes)

    def shrink_after(self, size: int, how: str) -> Restart:
        """Take the next smaller size than one that took the machine down in an earlier command.

        Where there is none, or another size is another loss, the same: the memory may be enough this time.
        """
        less = None if self.job.training.sorts else smaller(recut(geometry(self.job, self.world), size))
        if less is None:
            return Restart(how)
        self.fits = less.per_device
        return Restart(f"out of memory: {how}", {"from": size, "to": less.per_device})
