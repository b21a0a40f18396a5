"""Metrics of an evaluation as estimates with intervals, and what became of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.intervals import wilson
from runner.report.loose import mapping, number, whole

MEANS = ("preference_margin", "reward_margin")
"""Metrics that are no shares: their intervals were made from every row, and cannot be made again."""

LOWER_IS_BETTER = ("eval_loss", "generated_rejected")

MEANING = {
    "relaxed_accuracy": "a number may be off by 5 %; any other answer is compared whole, without case",
    "exact_match": "the answer is the same to the letter",
    "preference_accuracy": "how often the chosen answer is likelier than the rejected one; a tie is half",
    "preference_margin": "log-probability of the chosen answer less that of the rejected one, on average",
    "reward_accuracy": "how often training moved the model towards the chosen answer",
    "reward_margin": "by how much it did, on average: the change of the margin, times DPO's beta",
    "generated_chosen": "how often what the model says itself is nearer to the chosen answer",
    "generated_rejected": "how often it is nearer to the rejected one: fewer are better",
}
"""What a number is, for people who have not met it."""

Change = Literal["better", "worse", "unclear", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A share or a mean, with the interval that holds it with 95 % confidence."""

    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Compared:
    """A metric, or a group of its rows, before and after training."""

    metric: str
    group: str | None
    """None: over all rows."""
    before: Estimate | None
    after: Estimate | None


def named(metric: str) -> str:
    """For people: `relaxed accuracy`."""
    return metric.removeprefix("eval_").replace("_", " ").replace("/", " ")


def main_metric(asked: Any, method: Any, metrics: Mapping[str, Any]) -> str:
    """The metric that a run is judged by: the job's, else its method's, else the first that there is."""
    if isinstance(asked, str):
        return asked
    usual = "preference_accuracy" if method == "dpo" else "relaxed_accuracy"
    return usual if usual in metrics or not metrics else next(iter(metrics))


def estimate(metrics: Mapping[str, Any], metric: str, group: str | None = None) -> Estimate | None:
    """One metric of an evaluation; None where it means nothing.

    stored                                  estimate
    {"overall": 0.5, "n": 4}                0.5, with Wilson's interval
    {"overall": 0.5, "n": 4, "low", "high"} 0.5, with the stored interval
    {"overall": 1.2, "n": 4} of a margin    1.2, without an interval
    0.7                                     0.7
    null                                    None
    """
    found = metrics.get(metric)
    if not isinstance(found, Mapping):
        value = number(found)
        return None if value is None or group is not None else Estimate(value)
    value = number(found.get(group or "overall"))
    count = whole(found.get(f"n_{group}" if group else "n"))
    if value is None:
        return None
    low, high = (None, None) if group else (number(found.get("low")), number(found.get("high")))
    if low is None or high is None:
        low, high = None, None
    if low is None and metric not in MEANS and count and 0 <= value <= 1:
        low, high = wilson(value, count)
    return Estimate(value, count, low, high)


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Compared, ...]:
    """Every metric that one of two evaluations has, each followed by its groups."""
    found = []
    for metric in dict.fromkeys([*before, *after]):
        groups = dict.fromkeys([*_groups(before.get(metric)), *_groups(after.get(metric))])
        for group in (None, *groups):
            one = Compared(metric, group, estimate(before, metric, group), estimate(after, metric, group))
            if one.before is not None or one.after is not None:
                found.append(one)
    return tuple(found)


def change(metric: str, before: Estimate | None, after: Estimate | None) -> Change:
    """What training made of a metric. `better` and `worse` only where the intervals leave no doubt.

    before                after                 change
    0.50 [0.44, 0.56]     0.97 [0.94, 0.99]     better
    0.97 [0.94, 0.99]     0.50 [0.44, 0.56]     worse
    0.50 [0.44, 0.56]     0.55 [0.49, 0.61]     unclear     the intervals overlap
    0.50                  0.97                  better      nobody knows the intervals
    0.50                  0.50                  unclear
    -                     any                   unknown
    any                   -                     unknown

    Of a metric in `LOWER_IS_BETTER` the other way round.
    """
    if before is None or after is None:
        return "unknown"
    if None not in (before.low, before.high, after.low, after.high):
        assert before.low is not None and before.high is not None
        assert after.low is not None and after.high is not None
        rose, fell = after.low > before.high, after.high < before.low
    else:
        rose, fell = after.value > before.value, after.value < before.value
    if metric in LOWER_IS_BETTER:
        rose, fell = fell, rose
    return "better" if rose else "worse" if fell else "unclear"


def _groups(found: Any) -> list[str]:
    parts = mapping(found)
    return [name.removeprefix("n_") for name in parts if name.startswith("n_") and name[2:] in parts]
