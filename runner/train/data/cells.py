"""What one cell of a row says: a class by its name, a text, a group. Pure.

Raises `Unusable` with the reason where it says nothing that can be used; which columns a format reads is
`runner.train.data.formats`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.train.data.messages import Unusable
from runner.train.evaluation.metrics import RESERVED_GROUPS

GROUPS = {
    "human": "human",
    "machine": "augmented",
    "human_test": "human",
    "augmented_test": "augmented",
}
"""ChartQA's words in its two editions (HuggingFaceM4, lmms-lab) -> the paper's. Others stay as they are."""


def cell(row: Mapping[str, Any], column: str, names: Sequence[str] | None) -> Any:
    """The value of a column; a class number becomes the name of its class.

    Args:
        names: of the classes, where the column holds class numbers.
    """
    value = row[column]
    if names is None or value is None:
        return value
    numbers = value if isinstance(value, list) else [value]
    if not all(number is not None and 0 <= number < len(names) for number in numbers):
        return None
    return [names[number] for number in numbers] if isinstance(value, list) else names[value]


def string(value: Any, what: str) -> str:
    """Text as it is; an integer in digits; another number in its shortest form without a trailing .0, because
    CSV readers turn a column of integers with a gap into floats, and the gap into NaN, which is no text."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(value, ".15g") if isinstance(value, float) else str(value)
    raise Unusable(f"{what} is a {type(value).__name__}, not text")


def required(value: Any, what: str) -> str:
    text = string(value, what)
    if not text.strip():
        raise Unusable(f"empty {what}")
    return text


def group(value: Any) -> str | None:
    """The part of the evaluation that a row belongs to."""
    if value is None:
        return None
    said = string(value, "group")
    name = GROUPS.get(said, said)
    if name in RESERVED_GROUPS or name.startswith("n_"):
        raise Unusable(f"group {name!r} is a word that results use themselves")
    return name
