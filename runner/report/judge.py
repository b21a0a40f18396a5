"""The predictions before and after training, row by row: what each became. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runner.report.loose import number, text, texts

Became = Literal["right", "fixed", "broken", "wrong"]

WORDS: dict[Became, str] = {
    "right": "Right",
    "fixed": "Fixed by training",
    "broken": "Broken by training",
    "wrong": "Wrong",
}

_ASKED = ("row", "question", "chosen", "rejected")
"""What tells one row from others: two sources may have rows of one name."""


@dataclass(frozen=True)
class Prediction:
    """A row of the evaluation, with what was said before and after training."""

    row: str
    question: str
    group: str | None
    answers: tuple[str, ...]
    """That are accepted; of a pair the chosen one."""
    rejected: str | None
    """Of a pair."""
    before: str | None
    """What was generated; None if it was not asked then."""
    after: str | None
    margins: tuple[float | None, float | None]
    """Of a pair, before and after: log-probability of the chosen answer less that of the rejected one."""
    became: Became
    images: tuple[str, ...]


def became(before: bool | None, after: bool | None) -> Became:
    """What a row became, from whether it was right; None: not asked then.

    before   after   became
    yes      yes     right
    no       no      wrong
    no       yes     fixed
    yes      no      broken
    -        yes     right
    -        no      wrong
    yes      -       right
    no       -       wrong
    -        -       wrong
    """
    if before is None or after is None:
        return "right" if before or after else "wrong"
    if after:
        return "right" if before else "fixed"
    return "broken" if before else "wrong"


def right(record: Mapping[str, Any], metric: str) -> bool | None:
    """Whether a record is right by a metric; None if it does not say.

    metric                record
    preference_accuracy   the chosen answer is likelier than the rejected one; a tie is not right
    any other             the field of that name
    """
    if metric == "preference_accuracy":
        margin = margin_of(record)
        return None if margin is None else margin > 0
    value = record.get(metric)
    return value if isinstance(value, bool) else None


def margin_of(record: Mapping[str, Any]) -> float | None:
    """Of a pair: log-probability of the chosen answer less that of the rejected one, in nats."""
    chosen, rejected = (number(record.get(f"logp_{name}")) for name in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else chosen - rejected


def predictions(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], metric: str
) -> tuple[Prediction, ...]:
    """Every row that was asked before or after, in the order of the later evaluation."""
    earlier = {_key(record): record for record in before}
    later = {_key(record): record for record in after}
    order = dict.fromkeys([*later, *earlier])
    return tuple(_joined(earlier.get(key, {}), later.get(key, {}), metric) for key in order)


def _key(record: Mapping[str, Any]) -> tuple[str | None, ...]:
    return tuple(text(record.get(name)) for name in _ASKED)


def _joined(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> Prediction:
    one = {**before, **after}
    chosen = text(one.get("chosen"))
    return Prediction(
        row=text(one.get("row")) or "?",
        question=text(one.get("question")) or "",
        group=text(one.get("group")),
        answers=texts(one.get("answers")) if chosen is None else (chosen,),
        rejected=text(one.get("rejected")),
        before=text(before.get("prediction")),
        after=text(after.get("prediction")),
        margins=(margin_of(before), margin_of(after)),
        became=became(right(before, metric), right(after, metric)),
        images=texts(one.get("images")),
    )
