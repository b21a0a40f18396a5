"""Whether an answer is right, and how many are. Pure: no torch, no files.

Relaxed accuracy is that of the ChartQA paper (arXiv 2203.10244, section 5.1) as lmms-eval computes it
(`lmms_eval/tasks/chartqa/utils.py`, `relaxed_correctness`), so that scores can be put beside published ones.
Which rows are asked, and what the model said, is `evaluate`'s; pairs of answers are judged by `pair_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TOLERANCE = 0.05
"""Relative error that a number may have, both sides included."""

METRICS = ("relaxed_accuracy", "exact_match")
RESERVED_GROUPS = frozenset({"overall", "n"})
"""Words that `summarize` uses itself; no group may have them."""

Parts = dict[str, float | int | None]
Summary = dict[str, Parts | None]
"""Metric -> its parts, `overall` and `n` among them; None where the metric means nothing."""


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> bool:
    """Right if one accepted answer is met: numbers within 5 %, anything else equal but for case.

        prediction    answer     right   because
        42            40         yes     |42 - 40| / 40 = 0.05
        42.1          40         no      0.0525
        38            40         yes     0.05
        37.9          40         no      0.0525
        -40           40         no      2.0
        50%           0.5        yes     a trailing % divides by 100
        50%           50         no      0.5 against 50
        5 %           5%         yes     the % may stand off
        0             0          yes     the answer 0 has no 5 %: compared as text
        0.0           0          no      text
        0.01          0          no      text
        1,000         1000       no      a comma is not part of a number, as in lmms-eval
        1,000         1,000      yes     text
        1e3           1000       yes     a number
        yes           Yes        yes     case
        Yes.          Yes        no      text is compared whole
        " blue "      Blue       yes     space around is nothing
        nan           nan        yes     not a number: text (lmms-eval: no, since nan is unequal to itself)
        inf           inf        yes     not a number: text (lmms-eval: no)
        2019_21       2019_20    no      text (lmms-eval reads Python's 201921 and says yes)
        ""            0          no      no answer is no number
        blue          red, blue  yes     any accepted answer will do

    The three rows that name lmms-eval are the only ones that differ from it, and all three are accidents of
    Python's `float`. `answers` empty is never right.
    """
    return any(_relaxed(prediction.strip(), answer.strip()) for answer in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Right if one accepted answer is met to the letter; only space around it is ignored.

    prediction    answer     right
    14            14         yes
    " 14 "        14         yes
    14.0          14         no
    yes           Yes        no
    blue          red, blue  yes
    """
    return any(prediction.strip() == answer.strip() for answer in answers)


def summarize(records: Sequence[Mapping[str, Any]]) -> Summary:
    """Share of right answers per metric: over all rows, and per group where rows have one.

    Args:
        records: each with a bool under every name of `METRICS`, and `group` (str or None).

    Returns:
        `{"relaxed_accuracy": {"overall": 0.5, "n": 4, "human": 0.0, "n_human": 2, ...}, "exact_match":
        {...}}`. Shares are in 0..1, null when there is no row; groups in alphabetical order.
    """
    groups = sorted({record["group"] for record in records if record["group"] is not None})
    summary: Summary = {}
    for metric in METRICS:
        right = [bool(record[metric]) for record in records]
        parts: Parts = {"overall": _share(right), "n": len(right)}
        for group in groups:
            part = [bool(record[metric]) for record in records if record["group"] == group]
            parts |= {group: _share(part), f"n_{group}": len(part)}
        summary[metric] = parts
    return summary


def _relaxed(prediction: str, answer: str) -> bool:
    said, truth = _number(prediction), _number(answer)
    if said is not None and truth:  # None and 0 have no relative error
        return abs(said - truth) / abs(truth) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    """The finite decimal number that the text is, or None; a trailing % divides by 100."""
    if "_" in text:
        return None
    try:
        value = float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None
