"""What the four trackers have in common, and how one is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runner.tracking.request import Request
from runner.tracking.rows import Ending, Known, Row


class Tracker(Protocol):
    """One run in one tracker, open. Libraries raise what they like: it ends this process and does no harm."""

    def known(self) -> Known:
        """What is there already, by the tracker's own reader."""

    def log(self, rows: Sequence[Row]) -> None:
        """Add rows, in the order of their steps, none of them known."""

    def end(self, ending: Ending | None) -> None:
        """Let nothing be left in memory. None: how the command ends is not known."""


def opened(request: Request) -> Tracker:
    """The run in its tracker: the one that is there, or a new one."""
    # Each import loads the libraries of one tracker.
    match request.tracker:
        case "tensorboard":
            from runner.tracking.to_tensorboard import TensorBoard

            return TensorBoard(request)
        case "wandb":
            from runner.tracking.to_wandb import WandB

            return WandB(request)
        case "mlflow":
            from runner.tracking.to_mlflow import MlFlow

            return MlFlow(request)
        case "trackio":
            from runner.tracking.to_trackio import Trackio

            return Trackio(request)
    raise ValueError(f"{request.tracker} is no tracker")
