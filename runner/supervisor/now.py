"""Where a run stands, from its events: what `HEAD` says of it to those who only look.

Nothing is decided by it. It is as old as the newest renewal of the lease.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from runner.events import Event

LOSSES = 20
"""Steps whose loss is kept: `HEAD` is written four times a minute."""

_SAVED = 64
"""Most checkpoints that are under way."""


class Now(BaseModel):
    """A moment of the newest attempt."""

    model_config = ConfigDict(frozen=True)

    epoch: int = 0
    """Of the owner that this is about."""
    phase: str | None = None
    """Of `runner.supervisor.progress.PHASES`, `start` before the first; None when its owner has ended."""
    step: int = 0
    steps: int | None = None
    """Of the whole run; None before a trainer has said it."""
    losses: list[tuple[int, float]] = []
    """Step and loss, oldest first."""
    step_seconds: float | None = None
    """Of one optimizer step, smoothed; waits and saves are not in it."""
    trained: float = 0.0
    """Seconds of steps in this attempt."""
    committed: float = 0.0
    """As many of them as the newest committed checkpoint has."""
    saved: dict[str, float] = {}
    """The same of those that are saved and not committed, by id."""

    @property
    def at_risk(self) -> float:
        """Seconds of steps that a lost machine would cost."""
        return max(0.0, self.trained - self.committed)

    def after(self, event: Event) -> Now:
        """What follows when this happens."""
        match event:
            case {"event": "owner", "epoch": int(epoch)}:
                return self._with(phase="start", epoch=epoch)
            case {"event": "attempt", "step": int(step)}:
                losses = [one for one in self.losses if one[0] <= step]
                new = self._with(phase="start", step=step, losses=losses)
                return new._with(trained=0.0, committed=0.0, saved={})
            case {"event": "plan", "steps": int(steps)}:
                return self._with(steps=steps)
            case {"event": "phase", "phase": str(phase)}:
                return self._with(phase=phase)
            case {
                "event": "step",
                "step": int(step),
                "steps": int(steps),
                "loss": int() | float() as loss,
                "seconds": int() | float() as seconds,
            }:
                return self._stepped(step, steps, loss, seconds)
            case {"event": "checkpoint", "id": str(id)}:
                saved = {**self.saved, id: self.trained}
                return self._with(saved=dict(list(saved.items())[-_SAVED:]))
            case {"event": "commit", "id": str(id)} if id in self.saved:
                has = self.saved[id]
                later = {other: saved for other, saved in self.saved.items() if saved > has}
                return self._with(committed=has, saved=later)
            case {"event": "end"}:
                return self._with(phase=None)
        return self

    def _stepped(self, step: int, steps: int, loss: float, seconds: float) -> Now:
        losses = [*self.losses, (step, float(loss))] if math.isfinite(loss) else self.losses
        seconds = float(seconds) if math.isfinite(seconds) and seconds >= 0 else 0.0
        before = seconds if self.step_seconds is None else self.step_seconds
        return self._with(
            step=step,
            steps=steps,
            losses=losses[-LOSSES:],
            step_seconds=round(0.9 * before + 0.1 * seconds, 4),
            trained=round(self.trained + seconds, 4),
        )

    def _with(self, **changes: object) -> Now:
        return self.model_copy(update=changes)
