"""Verdicts on pairs: the rows of the docstrings' tables, the intervals, and the summary."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from runner.intervals import Z, normal, wilson
from runner.train.evaluation.pair_metrics import METRICS, nearer, preferred, summarize

NEARER = [
    ("red 1, blue 2", "red 1, blue 2", "blue 2, red 1", "chosen"),
    ("blue 2, red 1", "red 1, blue 2", "blue 2, red 1", "rejected"),
    ("Blue 2; RED 1!", "red 1, blue 2", "blue 2, red 1", "rejected"),
    ("red 1, blue 9", "red 1, blue 2", "blue 2, red 1", "chosen"),
    ("green 7", "red 1, blue 2", "blue 2, red 1", None),
    ("2", "red 1, blue 2", "blue 2, red 1", None),
    ("", "red 1, blue 2", "blue 2, red 1", None),
    ("a cat", "a cat", "A cat.", None),
]

WILSON = [(0.5, 240, 0.4372, 0.5628), (1.0, 240, 0.9842, 1.0), (0.0, 240, 0.0, 0.0158), (1.0, 1, 0.2065, 1.0)]


def table(function: Any) -> list[list[str]]:
    """The rows of a docstring's table, without its head; columns are two spaces apart."""
    lines = (function.__doc__ or "").split("\n\n")[1].strip().splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:]]


@pytest.mark.parametrize(("prediction", "chosen", "rejected", "verdict"), NEARER)
def test_nearer_follows_its_table(prediction: str, chosen: str, rejected: str, verdict: str | None) -> None:
    assert nearer(prediction, chosen, rejected) == verdict
    mirrored = {"chosen": "rejected", "rejected": "chosen", None: None}[verdict]
    assert nearer(prediction, rejected, chosen) == mirrored


def test_the_docstrings_have_every_row() -> None:
    rows = [[said or '""', chosen, rejected, verdict or "-"] for said, chosen, rejected, verdict in NEARER]
    assert table(nearer) == rows
    assert [[float(cell) for cell in row] for row in table(wilson)] == [list(row) for row in WILSON]
    for chosen, rejected, counts in ([float(cell) for cell in row] for row in table(preferred)):
        assert preferred(chosen, rejected) == counts
    assert len(table(preferred)) == 3


@pytest.mark.parametrize(("share", "count", "low", "high"), WILSON)
def test_wilson_follows_its_table(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)


def test_the_ends_of_wilsons_interval_are_just_not_rejected_by_the_score_test() -> None:
    for end in wilson(0.3, 50):
        assert abs(0.3 - end) / (end * (1 - end) / 50) ** 0.5 == pytest.approx(Z)


def test_the_interval_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    half = Z * statistics.stdev(values) / 2
    assert normal(values) == pytest.approx((4 - half, 4 + half))
    assert normal([1.0]) == normal([]) == (None, None)


def record(
    chosen: float, rejected: float, verdict: str | None, reference: Any = (None, None)
) -> dict[str, Any]:
    return {
        "logp_chosen": chosen,
        "logp_rejected": rejected,
        "tokens_chosen": 10,
        "tokens_rejected": 2,
        "reference_logp_chosen": reference[0],
        "reference_logp_rejected": reference[1],
        "nearer": verdict,
    }


def test_summary_of_pairs() -> None:
    records = [
        record(-5.0, -6.0, "chosen", (-5.0, -5.0)),  # reward 0 and -1
        record(-5.0, -2.0, "rejected", (-7.0, -2.0)),  # 2 and 0
        record(-10.0, -2.0, None, (-8.0, -2.0)),  # -2 and 0; the same per token
        record(-3.0, -3.0, "chosen", (-3.0, -3.0)),
    ]
    found = summarize(records, beta=0.5)
    assert tuple(found) == METRICS
    low, high = wilson(0.375, 4)
    assert found["preference_accuracy"] == {
        "overall": 0.375,
        "n": 4,
        "low": low,
        "high": high,
        "length_normalized": 0.875,
    }
    low, high = normal([1.0, -3.0, -8.0, 0.0])
    assert found["preference_margin"] == {"overall": -2.5, "n": 4, "low": low, "high": high}
    assert found["reward_accuracy"] is not None and found["reward_accuracy"]["overall"] == 0.625
    assert found["reward_margin"] is not None and found["reward_margin"]["overall"] == 0.125
    assert found["generated_chosen"] is not None and found["generated_chosen"]["overall"] == 0.5
    assert found["generated_rejected"] is not None and found["generated_rejected"]["overall"] == 0.25


@pytest.mark.parametrize(
    ("references", "beta"),
    [([(None, None)] * 2, 0.1), ([(-1.0, -1.0), (None, None)], 0.1), ([(-1.0, -1.0)] * 2, None)],
)
def test_no_rewards_without_a_reference_for_every_pair(references: list[Any], beta: float | None) -> None:
    found = summarize([record(-1.0, -2.0, None, reference) for reference in references], beta)
    assert found["reward_accuracy"] is found["reward_margin"] is None
    assert found["preference_accuracy"] is not None and found["preference_accuracy"]["overall"] == 1.0


def test_summary_of_nothing_is_null() -> None:
    assert summarize([], None)["preference_accuracy"] == {
        "overall": None,
        "n": 0,
        "low": None,
        "high": None,
        "length_normalized": None,
    }
