"""Overfitting is watched: when a run is evaluated during training, and the best that it was by then.

    evaluations.json       in a checkpoint: every evaluation up to it, and when the next is due
    best.safetensors       in a checkpoint: parameters of the best one's step, named as parameters.safetensors
    evaluations.jsonl      in the run's folder: the evaluations, for people

A step is saved before it is evaluated, and what is learned by that goes into the next checkpoint. So an
evaluation that a kill cuts off is made again from its own step, and what was the best lives as long as the
run: it is the saved file of its step, and costs a store nothing twice. Rank 0 alone has files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.checkpoint.adapter_file import PARAMETERS
from runner.durable import disk, write_text
from runner.errors import DataError
from runner.manifest import Evaluation as Spec
from runner.train import state
from runner.train.evaluation.history import Evaluated, History, value_of
from runner.train.world import from_first, world

STATE = "evaluations.json"
BEST = "best.safetensors"
CANDIDATE = "candidate.safetensors"
"""In the attempt's folder: parameters of the step that was saved to be evaluated."""
RECORD = "evaluations.jsonl"


class Watch:
    """The evaluations during one run's training.

    Args:
        spec: of the job; None evaluates nothing.
        attempt_dir: where files lie until a checkpoint takes them.
        record: evaluations.jsonl in the run's folder.
        restore: the checkpoint that training goes on from.

    Raises:
        DataError: the checkpoint's files are not what a run saves.
    """

    def __init__(
        self,
        spec: Spec | None,
        *,
        attempt_dir: Path,
        record: Path,
        restore: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec or Spec()
        self._folder = attempt_dir
        self._record = record
        self._clock = clock
        kept, seconds = _load(restore, self._spec) if restore is not None else ([], 0.0)
        self.history = History(self._spec, kept)
        self._since = clock() - seconds
        """When the last one was, had training never been interrupted."""
        self.ended_early = False
        if world().first:
            if restore is not None:
                self._adopt(restore)
            self._tell()

    # --- when ---

    def due(self, step: int, last: int) -> bool:
        """Whether a step that has just been done is to be saved and evaluated; collective.

        steps 5, last 12      at 5 and 10; at 12 where the best is chosen, whose last candidate it is
        minutes 10, last 12   the first step after every 10 minutes of training; at 12 as above
        neither               never
        """
        if not self._spec.during:
            return False
        if step >= last:
            return self._spec.metric_for_best_model is not None
        if self._spec.steps is not None:
            return step % self._spec.steps == 0
        assert self._spec.minutes is not None
        return from_first(self._clock() - self._since >= 60 * self._spec.minutes)

    def pending(self, step: int, last: int) -> bool:
        """Whether the step that training goes on from was saved to be evaluated, and was not."""
        on_clock = self._spec.minutes is not None and step < last
        return step > 0 and not on_clock and self.due(step, last) and not self.history.has(step)

    # --- what it leads to ---

    def saved(self, checkpoint: Path) -> None:
        """The step of a checkpoint will be evaluated; rank 0's, before others can move its files."""
        if self._spec.metric_for_best_model is not None:
            with disk("keep the parameters of an evaluation", self._folder):
                _link(checkpoint / PARAMETERS, self._folder / CANDIDATE)

    def take(self, step: int, metrics: dict[str, Any]) -> None:
        """Note an evaluation, the same on every rank."""
        best = self.history.add(step, metrics)
        self._since = self._clock()
        self.ended_early = self.history.exhausted
        if world().first:
            with disk("keep the best parameters", self._folder):
                if best:
                    (self._folder / CANDIDATE).replace(self._folder / BEST)
                else:
                    (self._folder / CANDIDATE).unlink(missing_ok=True)
            self._tell()

    def write(self, folder: Path) -> None:
        """Put what was learned into a checkpoint that is being saved; rank 0's."""
        if not self._spec.during:
            return
        seconds = self._clock() - self._since
        content = {"seconds": seconds, "evaluations": [asdict(one) for one in self.history.evaluations]}
        with state.writing(folder):
            (folder / STATE).write_text(json.dumps(content))
            if self.history.best is not None:
                _link(self._folder / BEST, folder / BEST)

    @property
    def best_file(self) -> Path:
        """Parameters of the best; rank 0's, where there is a best."""
        return self._folder / BEST

    def told(self) -> dict[str, Any] | None:
        """The best, for the outcome: its step, the metric and its value."""
        best, metric = self.history.best, self._spec.metric_for_best_model
        if best is None or metric is None:
            return None
        return {"step": best.step, "metric": metric, "value": value_of(best.metrics, metric)}

    def clear(self) -> None:
        """Training is through and exported: the files are of no use any more."""
        for name in (BEST, CANDIDATE):
            (self._folder / name).unlink(missing_ok=True)

    def _adopt(self, restore: Path) -> None:
        """Have the files that a later checkpoint or evaluation needs."""
        with disk("go on from a checkpoint", self._folder):
            if self.history.best is not None:
                if not (restore / BEST).is_file():
                    raise DataError(
                        f"checkpoint {restore.name}: {BEST} is missing, which {STATE} speaks of; remedy: "
                        "take this checkpoint out of the run's store"
                    )
                _link(restore / BEST, self._folder / BEST)
            if self._spec.metric_for_best_model is not None:
                _link(restore / PARAMETERS, self._folder / CANDIDATE)

    def _tell(self) -> None:
        """Write what is so now over what an attempt before, whose steps were lost, had told."""
        if self._spec.during and (self.history.evaluations or self._record.exists()):
            lines = "".join(json.dumps(asdict(one)) + "\n" for one in self.history.evaluations)
            with disk("write the evaluations", self._record):
                write_text(self._record, lines)


def _load(folder: Path, spec: Spec) -> tuple[list[Evaluated], float]:
    """The evaluations of a checkpoint, and seconds of training since the last."""
    if not spec.during or not (folder / STATE).exists():  # none were asked for when it was saved
        return [], 0.0
    with state.reading(folder, STATE):
        content = json.loads((folder / STATE).read_text())
        found = [Evaluated(**one) for one in content["evaluations"]]
        for one in found:
            if type(one.step) is not int or not isinstance(one.metrics, dict) or type(one.best) is not bool:
                raise TypeError(f"{one} is no evaluation")
        json.dumps([asdict(one) for one in found])  # no deeper than what is written again
        steps = [one.step for one in found]
        if steps != sorted(set(steps)):
            raise ValueError("its steps do not rise")
        seconds = float(content["seconds"])
        if not math.isfinite(seconds):
            raise ValueError(f"seconds is {seconds}")
        return found, seconds


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
