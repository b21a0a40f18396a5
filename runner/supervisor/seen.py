"""What a trainer's events say about where it is: the phase, the step, the rows, the size of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from runner.events import Event


@dataclass
class Seen:
    """What a trainer's events said so far."""

    phase: str = "start"
    step: int | None = None
    """The optimizer step at work while in training, from 1; None when the last one is done."""
    rows: tuple[int, ...] = ()
    """Rows of that step, if they were said."""
    per_device: int | None = None
    """The per-device size at work, tried or found; None before any."""
    fits: bool = False
    """Whether that size is what training runs with."""
    memory_peak: float | None = None
    """The highest share of the memory limit that was in use (`cgroup.pressure`); None without a limit."""

    def note(self, event: Event) -> None:
        """Take one event."""
        match event["event"]:
            case "phase":
                self.phase = event["phase"]
            case "plan":
                restored = event.get("restored_step")
                self.step = restored + 1 if isinstance(restored, int) else None
                self._note_size(event.get("geometry"))
            case "probe":
                self.per_device = event["per_device"]
            case "begin":
                self.step, self.rows = event["step"], tuple(event["ids"])
            case "step":
                done = event["step"] >= event["steps"]
                self.step, self.rows = None if done else event["step"] + 1, ()

    @property
    def place(self) -> str:
        """`in step 17`, `in phase load`: where the trainer was."""
        return f"in step {self.step}" if self.working is not None else f"in phase {self.phase}"

    @property
    def working(self) -> int | None:
        """The step at work, None outside training."""
        return self.step if self.phase == "train" else None

    @property
    def with_batch(self) -> bool:
        """Whether a micro-batch is or was just in memory."""
        return self.phase in ("probe", "train", "save")

    def _note_size(self, cut: object) -> None:
        if isinstance(cut, dict) and isinstance(cut.get("per_device"), int):
            self.per_device, self.fits = cut["per_device"], True
