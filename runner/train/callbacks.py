"""When a run saves and when it stops: at optimizer-step boundaries, by one rule.

save   at `save_steps`, when `save_seconds` have passed since the last save, at the last step, on request
stop   on request, after that save

With `eval_strategy: epoch` the loss is evaluated at the epoch's last step, before that step's save.

Trainer loop, per optimizer step:
    forward and backward of every micro-batch, optimizer.step()
    on_step_end            <- here: decide save and stop
    record the step, log, evaluate, save
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveAndStop(TrainerCallback):
    """Sets `should_save` and `should_training_stop`; remembers whether the run was asked to stop."""

    def __init__(
        self,
        *,
        save_steps: int | None,
        save_seconds: float,
        stop_requested: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._save_steps = save_steps
        self._save_seconds = save_seconds
        self._stop_requested = stop_requested
        self._clock = clock
        self._saved_at = clock()
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._saved_at = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.stopped = self._stop_requested()
        if self.stopped:
            control.should_training_stop = True
        on_grid = self._save_steps is not None and state.global_step % self._save_steps == 0
        overdue = self._clock() - self._saved_at >= self._save_seconds
        if self.stopped or on_grid or overdue or state.global_step >= state.max_steps:
            control.should_save = True
        if args.eval_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch or 0):
            # Now, and not after the save: a resume from that checkpoint would skip it.
            control.should_evaluate = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = False
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._saved_at = self._clock()
