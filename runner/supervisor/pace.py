"""How often a run saves, and when training waits for the store: by what saves and commits were seen to cost.

A machine that is lost takes with it what was trained since the save of the newest committed checkpoint. That
must stay below `checkpoints.max_loss`: saves come early enough for their commit to arrive in time, and where
the store is slower than that, training waits at the next step boundary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from runner.checkpoint.head import Entry
from runner.events import Event

MTBF = 7200.0
"""Seconds between two losses of a machine that saving is tuned for. Most spot GPUs live longer; the interval
grows with the root of it only."""

UNMEASURED_SAVE = 1.0
UNMEASURED_COMMIT = 0.25
"""Of `max_loss`."""


def save_interval(
    max_loss: float, save: float | None, commit: float | None, step: float | None = None
) -> float:
    """Seconds of training between two saves.

    The interval that loses the least to saving and to repeating is sqrt(2 x save x MTBF) (Young, A first
    order approximation to the optimum checkpoint interval, CACM 17, 1974). It is cut so that what is at risk
    when the next commit arrives, interval + the rest of a step + save + commit, stays below `max_loss`; never
    below the save itself, because half of the time should train.

    Args:
        save: seconds that training stands still for one save; None: not measured yet.
        commit: seconds from there until the store has it; None: not measured yet.
        step: seconds of an optimizer step, at whose end a save comes; None: not measured yet.
    """
    save = UNMEASURED_SAVE if save is None else save
    commit = UNMEASURED_COMMIT * max_loss if commit is None else commit
    return max(min(math.sqrt(2 * save * MTBF), max_loss - save - commit - (step or 0.0)), save, 0.05)


class Pace:
    """What is at risk in one supervisor's attempts, in seconds of training.

    Args:
        max_loss: `checkpoints.max_loss`, seconds.
    """

    def __init__(self, max_loss: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_loss = max_loss
        self._clock = clock
        self._save: float | None = None
        self._commit: float | None = None
        self._step: float | None = None
        self._trained = 0.0
        self._since: float | None = None
        """When the trainer last went to work; None while it does not train."""
        self._saved: dict[str, float] = {}
        """Training seconds at the save of what is not committed yet, by id."""
        self._committed = 0.0
        """The same of what is committed."""

    def begin(self) -> None:
        """A trainer starts from what is committed."""
        self._trained = self._committed = self._now()
        self._since, self._saved = None, {}

    def note(self, event: Event) -> None:
        """Take an event of the trainer."""
        match event["event"]:
            case "phase":
                self._trained = self._now()
                self._since = self._clock() if event["phase"] in ("train", "save") else None
            case "step":
                self._step = _smoothed(self._step, float(event["seconds"]))
            case "checkpoint":
                self._saved[event["id"]] = self._now()
                seconds = event.get("seconds")
                if isinstance(seconds, int | float):
                    self._save = _smoothed(self._save, float(seconds))

    def committed(self, entry: Entry, seconds: float) -> None:
        """A checkpoint has reached the store, `seconds` after it was taken up."""
        self._commit = _smoothed(self._commit, seconds)
        if (at := self._saved.pop(entry.id, None)) is not None:
            self._committed = at
            self._saved = {id: saved for id, saved in self._saved.items() if saved > at}

    @property
    def at_risk(self) -> float:
        """Seconds of training that a lost machine would cost now."""
        return self._now() - self._committed

    @property
    def behind(self) -> bool:
        """Whether training must wait."""
        return self.at_risk >= self._max_loss

    @property
    def save_seconds(self) -> float:
        """The interval to save at."""
        return save_interval(self._max_loss, self._save, self._commit, self._step)

    @property
    def last_save(self) -> float:
        """Seconds from a request to save until the store has it, as far as known."""
        return (self._save or 0.0) + (self._commit or 0.0)

    @property
    def commit_seconds(self) -> float:
        """Seconds of a commit, as far as known."""
        return self._commit or 0.0

    def too_slow(self) -> str | None:
        """What to say when `max_loss` cannot be kept without waiting at every save."""
        if self._save is None or self._commit is None or self._save + self._commit < self._max_loss:
            return None
        return (
            f"checkpoints.max_loss is {self._max_loss:g} s, and a save takes {self._save:.1f} s and its "
            f"commit {self._commit:.1f} s: training waits for the store at every save; remedy: a larger "
            "max_loss, or a faster store"
        )

    def _now(self) -> float:
        return self._trained + (0.0 if self._since is None else self._clock() - self._since)


def _smoothed(before: float | None, now: float) -> float:
    """Towards the newest, at once where it is larger."""
    return now if before is None else max(now, 0.7 * before + 0.3 * now)
