"""When a run saves, waits and stops: at optimizer-step boundaries, by one rule.

save       at `save_steps`, when `save_seconds` have passed since the last save, at the last step, before an
           evaluation, on each request
wait       on request, once everything that was done is saved; not after the last step
evaluate   when it is due (`runner.train.watch`), after that save; not when stopped
stop       on request, after that save

With `eval_strategy: epoch` the loss is evaluated at the epoch's last step, before that step's save.

Trainer loop, per optimizer step:
    forward and backward of every micro-batch, optimizer.step()
    on_step_end            <- here: decide save, evaluation and stop
    record the step, log, evaluate upstream's loss, save
    on_save                <- here: wait
    evaluate
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runner.errors import Preempted
from runner.request import Request

T = TypeVar("T")

POLL = 0.1
"""Seconds between two looks at the request while a run waits."""


class SaveAndStop(TrainerCallback):
    """Sets `should_save` and `should_training_stop`; remembers whether the run was asked to stop.

    Args:
        save_seconds: of training between two saves, until a request says another; waiting is no training.
        request: what the supervisor asks for now.
        tell_phase: takes "wait", and "train" when training goes on.
        evaluation_due: whether the step that was done, of so many, is to be evaluated; the same on all ranks.
        agree: the same answer on every rank, whatever this one has read or measured (`world.from_first`).
    """

    def __init__(
        self,
        *,
        save_steps: int | None,
        save_seconds: float,
        request: Callable[[], Request],
        tell_phase: Callable[[str], None],
        evaluation_due: Callable[[int, int], bool] = lambda step, last: False,
        agree: Callable[[T], T] = lambda value: value,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._save_steps = save_steps
        self._save_seconds = save_seconds
        self._request = request
        self._tell_phase = tell_phase
        self._evaluation_due = evaluation_due
        self._agree: Callable[[Any], Any] = agree
        self._clock = clock
        self._sleep = sleep
        self._saved_at = clock()
        self._saves = 0
        """As many as were asked for and came."""
        self.stopped = False
        self.evaluate = False
        """Whether the step at work is to be evaluated."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait if asked to: nothing was done since the state that training starts from.

        Raises:
            Preempted: asked to stop out of that wait.
        """
        if self._wait() == "stop":
            raise Preempted("stopped before training; the state before it is saved")
        self._saved_at = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        asked = self._asked()
        self.stopped = asked.action == "stop"
        if self.stopped:
            control.should_training_stop = True
        on_grid = self._save_steps is not None and state.global_step % self._save_steps == 0
        overdue = self._agree(self._clock() - self._saved_at >= self._save_seconds)
        wanted = asked.action != "go" or asked.saves != self._saves
        self._saves = asked.saves
        self.evaluate = self._evaluation_due(state.global_step, state.max_steps)
        if wanted or on_grid or overdue or self.evaluate or state.global_step >= state.max_steps:
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
    ) -> TrainerControl:
        if not self.stopped and state.global_step < state.max_steps and self._wait() == "stop":
            self.stopped = control.should_training_stop = True
        self._saved_at = self._clock()
        return control

    def _wait(self) -> str:
        """Return what is asked for, when that is not to wait: at once, or after having waited."""
        action = self._asked().action
        if action != "wait":
            return action
        self._tell_phase("wait")
        while action == "wait":
            self._sleep(POLL)
            action = self._asked().action
        if action == "go":
            self._tell_phase("train")
        return action

    def _asked(self) -> Request:
        """The request, and the save interval that it sets.

        Every decision at a boundary comes from here: where there are several ranks, this is where they agree
        on what one of them has read.
        """
        asked = self._agree(self._request())
        if asked.save_seconds is not None:
            self._save_seconds = asked.save_seconds
        return asked
