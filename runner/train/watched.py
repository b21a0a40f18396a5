"""Evaluations during training: the loss by upstream's loop, answers by ours, and what they decide.

A base of `runner.train.trainer.RunTrainer`, which says when; the rules are `runner.train.watch`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from runner.errors import Preempted, RunnerError
from runner.plan import Plan
from runner.train import loading, rng, state
from runner.train.callbacks import SaveAndStop
from runner.train.channel import Channel
from runner.train.gathering import put
from runner.train.memory import memory_named
from runner.train.watch import Watch
from runner.train.world import from_first, world

EVALUATION = ("eval_loss", "eval_mean_token_accuracy", "eval_rewards/accuracies", "eval_rewards/margins")
"""What an evaluation of the loss tells the supervisor; the rest of upstream's metrics are timings."""


class WatchedTrainer(Trainer):
    """Evaluates a step that is saved, and takes what follows."""

    _plan: Plan
    _channel: Channel
    _evaluate_now: Callable[[int], dict[str, Any] | None]
    control_callback: SaveAndStop
    watch: Watch
    steps: list[state.Step]
    _scored = 0
    """Rows whose loss was taken, of the evaluation at work."""
    _may_be_cut = False
    """Whether a request to stop ends an evaluation of the loss."""

    def _evaluate_step(self, step: int) -> None:
        """Evaluate a step that is saved, and stop there if that was asked for or nothing gets better any
        more. Collective."""
        spec = self._plan.job.evaluation
        assert spec is not None
        metrics = self._evaluate_now(step)
        losses = self._losses() if spec.loss and metrics is not None else {}
        if metrics is None or losses is None:
            self.control_callback.stopped = self.control.should_training_stop = True
            return
        # Rank 0's, so that no rounding of another makes ranks choose otherwise.
        self.watch.take(step, from_first({**metrics, **losses}))
        self._channel.send("phase", phase="train")
        if self.watch.ended_early and step < self.state.max_steps:
            self.control.should_training_stop = True

    def _losses(self) -> dict[str, float | None] | None:
        """Upstream's evaluation of the loss; None when a request to stop cut it off."""
        self._may_be_cut = True
        try:
            return _told(self.evaluate())
        except Preempted:
            return None
        finally:
            self._may_be_cut = False

    def evaluate_last(self) -> None:
        """Evaluate the last step where that was cut off. Upstream has no epoch left for such a checkpoint, if
        the step ends one. Collective."""
        step = self.state.global_step
        if self.watch.pending(step, self.state.max_steps) and not self.control_callback.stopped:
            self._evaluate_step(step)

    def take_best(self) -> None:
        """Put the best evaluation's parameters into the model, where one is chosen and is not the last step.
        Collective."""
        best = self.watch.history.best
        if best is not None and best.step != self.steps[-1].step:
            values = state.best(self.watch.best_file, self.model) if world().first else {}
            put(values, self.model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Upstream's evaluation of the loss, without drawing from the training generators."""
        self._scored = 0
        size = self.args.per_device_eval_batch_size
        remedy = f"a training.per_device_eval_batch_size below {size}"
        message = f"evaluation of the loss: out of memory. Remedy: {remedy}"
        with rng.preserved(), memory_named(RunnerError, message), loading.unwrapped():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._channel.send("evaluation", when="during", step=self.state.global_step, metrics=_told(metrics))
        return metrics

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._may_be_cut and from_first(self._channel.request().action == "stop"):
            raise Preempted("stopped in an evaluation of the loss; the state before it is saved")
        rows = len(inputs.pop("row_index")) * world().size
        del inputs["image_count"]
        result = super().prediction_step(model, inputs, *args, **kwargs)
        total = len(self.eval_dataset)
        self._scored = min(self._scored + rows, total)
        self._channel.send("progress", phase="evaluate_loss", done=self._scored, total=total)
        return result


def _told(metrics: dict[str, float]) -> dict[str, float | None]:
    """What is told of an evaluation; JSON has no word for what is not finite."""
    known = {name: metrics[name] for name in EVALUATION if name in metrics}
    return {name: value if math.isfinite(value) else None for name, value in known.items()}
