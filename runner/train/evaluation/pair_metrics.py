"""Whether the chosen answer is preferred, and how many are. Pure: no torch, no files.

A pair is judged twice: by what the model thinks of its two answers (their log-probabilities, from
`pairs`), and by what it says itself (nearer to the one or to the other). Shares and means come
with a 95 % confidence interval, because held-out sets of pairs are small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from runner.intervals import normal, wilson
from runner.train.evaluation.metrics import Parts, Summary

METRICS = (
    "preference_accuracy",
    "preference_margin",
    "reward_accuracy",
    "reward_margin",
    "generated_chosen",
    "generated_rejected",
)


def preferred(chosen: float, rejected: float) -> float:
    """What a pair counts in an accuracy, from the scores of its answers: a tie one half.

    chosen  rejected  counts
    -1.0    -2.0      1.0
    -2.0    -1.0      0.0
    -1.0    -1.0      0.5
    """
    return 0.5 if chosen == rejected else float(chosen > rejected)


def nearer(prediction: str, chosen: str, rejected: str) -> Literal["chosen", "rejected"] | None:
    """The answer that a prediction is more like, in words; None if it is as much like both.

        prediction      chosen          rejected        nearer
        red 1, blue 2   red 1, blue 2   blue 2, red 1   chosen
        blue 2, red 1   red 1, blue 2   blue 2, red 1   rejected
        Blue 2; RED 1!  red 1, blue 2   blue 2, red 1   rejected
        red 1, blue 9   red 1, blue 2   blue 2, red 1   chosen
        green 7         red 1, blue 2   blue 2, red 1   -
        2               red 1, blue 2   blue 2, red 1   -
        ""              red 1, blue 2   blue 2, red 1   -
        a cat           a cat           A cat.          -

    Like is `difflib.SequenceMatcher.ratio` over words: twice the words that match, in the same order, over
    the words of both. A word is letters and digits, whatever their case; marks are none. A tie is neither, so
    that an answer about something else is not blamed on the model's taste.
    """
    said = _words(prediction)
    likeness = {name: _likeness(said, _words(text)) for name, text in (("c", chosen), ("r", rejected))}
    if likeness["c"] == likeness["r"]:
        return None
    return "chosen" if likeness["c"] > likeness["r"] else "rejected"


def summarize(records: Sequence[Mapping[str, Any]], beta: float | None) -> Summary:
    """Every metric of `METRICS`.

    Args:
        records: each with `logp_chosen` and `logp_rejected` (nats, summed over the answer's tokens),
            `tokens_chosen` and `tokens_rejected`, `reference_logp_chosen` and `reference_logp_rejected` (the
            same under the reference, or None), and `nearer` ("chosen", "rejected" or None).
        beta: of the training; a reward is beta x (logp - reference), as TRL logs it. None: no reference.

    Returns:
        `{"preference_accuracy": {"overall": 0.5, "n": 240, "low": 0.44, "high": 0.56, "length_normalized":
        0.5}, ...}`. `preference_accuracy` is the share of pairs with logp(chosen) > logp(rejected),
        `length_normalized` the same with logp per token; `preference_margin` is the mean of logp(chosen) -
        logp(rejected); `reward_accuracy` and `reward_margin` are the same of rewards, and None as soon as one
        record has no reference; `generated_*` are shares of predictions that are nearer to that answer.
    """
    summary: Summary = dict.fromkeys(METRICS)
    summary["preference_accuracy"] = {
        **_share([preferred(row["logp_chosen"], row["logp_rejected"]) for row in records]),
        "length_normalized": _share([_preferred_per_token(row) for row in records])["overall"],
    }
    summary["preference_margin"] = _mean([row["logp_chosen"] - row["logp_rejected"] for row in records])
    if beta is not None and all(row["reference_logp_chosen"] is not None for row in records):
        rewards = [_rewards(row, beta) for row in records]
        summary["reward_accuracy"] = _share([preferred(chosen, rejected) for chosen, rejected in rewards])
        summary["reward_margin"] = _mean([chosen - rejected for chosen, rejected in rewards])
    for name in ("chosen", "rejected"):
        summary[f"generated_{name}"] = _share([float(row["nearer"] == name) for row in records])
    return summary


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _likeness(said: Sequence[str], answer: Sequence[str]) -> float:
    # autojunk would drop the commonest words of long answers.
    return SequenceMatcher(None, said, answer, autojunk=False).ratio()


def _preferred_per_token(row: Mapping[str, Any]) -> float:
    return preferred(row["logp_chosen"] / row["tokens_chosen"], row["logp_rejected"] / row["tokens_rejected"])


def _rewards(row: Mapping[str, Any], beta: float) -> tuple[float, float]:
    return (
        beta * (row["logp_chosen"] - row["reference_logp_chosen"]),
        beta * (row["logp_rejected"] - row["reference_logp_rejected"]),
    )


def _share(counts: Sequence[float]) -> Parts:
    if not counts:
        return {"overall": None, "n": 0, "low": None, "high": None}
    share = math.fsum(counts) / len(counts)
    low, high = wilson(share, len(counts))
    return {"overall": share, "n": len(counts), "low": low, "high": high}


def _mean(values: Sequence[float]) -> Parts:
    low, high = normal(values)
    overall = math.fsum(values) / len(values) if values else None
    return {"overall": overall, "n": len(values), "low": low, "high": high}
