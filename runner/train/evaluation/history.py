"""The evaluations during training, in order: which was the best, and whether that was long ago. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.manifest import Evaluation as Spec

LOSS = "loss"
"""The metric of `evaluation.metric_for_best_model` that is better when it is smaller."""

EVAL_LOSS = "eval_loss"
"""Its name among metrics, upstream's."""


@dataclass(frozen=True)
class Evaluated:
    """One of them; a line of evaluations.jsonl."""

    step: int
    """Optimizer steps that were done."""
    metrics: dict[str, Any]
    """As the trainer's event has them; `eval_loss` and upstream's other numbers beside."""
    best: bool
    """Whether it was better than all before, by `metric_for_best_model`."""


@dataclass(frozen=True)
class Standing:
    """What a sequence of values amounts to."""

    best: int | None
    """Index of the best, the first of equals; None if there is none."""
    stale: int
    """Values since the last that improved on all before it by more than the threshold."""


def standing(values: Sequence[float | None], *, larger: bool, threshold: float = 0.0) -> Standing:
    """Judge values as transformers' EarlyStoppingCallback does.

        values               larger  threshold   best  stale
        -                    yes     0           -     0
        0.2, 0.5, 0.4, 0.5   yes     0           1     2      an equal is no improvement
        0.2, 0.5, 0.4, 0.3   no      0           0     3
        0.50, 0.52, 0.54     yes     0.03        2     2      each is the best, none by enough
        0.50, 0.52, 0.58     yes     0.03        2     0
        None, 0.5, None      yes     0           1     1      unknown improves nothing
        None, None           yes     0           -     2

    Args:
        values: None where a metric means nothing.
        larger: whether a larger value is better.
    """
    best: int | None = None
    top, stale = 0.0, 0
    for index, value in enumerate(values):
        if value is None or math.isnan(value):
            stale += 1
            continue
        gain = math.inf if best is None else (value - top if larger else top - value)
        stale = 0 if gain > threshold else stale + 1
        if gain > 0:
            best, top = index, value
    return Standing(best, stale)


def value_of(metrics: Mapping[str, Any], metric: str) -> float | None:
    """A metric's one number, over all rows; None where it means nothing."""
    found = metrics.get(EVAL_LOSS if metric == LOSS else metric)
    number = found.get("overall") if isinstance(found, Mapping) else found
    return float(number) if isinstance(number, int | float) else None


class History:
    """The evaluations of a run up to now.

    Args:
        spec: of the job. Without `metric_for_best_model` nothing is the best, and nothing ends early.
    """

    def __init__(self, spec: Spec, kept: Sequence[Evaluated] = ()) -> None:
        self._spec = spec
        self.evaluations = list(kept)

    def add(self, step: int, metrics: dict[str, Any]) -> bool:
        """Take the next one. Returns whether it is the best so far."""
        self.evaluations.append(Evaluated(step, metrics, best=False))
        best = self._standing().best == len(self.evaluations) - 1
        self.evaluations[-1] = Evaluated(step, metrics, best)
        return best

    def has(self, step: int) -> bool:
        """Whether a step was evaluated."""
        return any(one.step == step for one in self.evaluations)

    @property
    def best(self) -> Evaluated | None:
        """The best so far; None without a metric to choose by, or where it means nothing."""
        index = self._standing().best
        return None if index is None else self.evaluations[index]

    @property
    def exhausted(self) -> bool:
        """Whether `early_stopping_patience` is at its end."""
        patience = self._spec.early_stopping_patience
        return patience is not None and self._standing().stale >= patience

    def _standing(self) -> Standing:
        metric = self._spec.metric_for_best_model
        if metric is None:
            return Standing(None, 0)
        values = [value_of(one.metrics, metric) for one in self.evaluations]
        return standing(values, larger=metric != LOSS, threshold=self._spec.early_stopping_threshold)
