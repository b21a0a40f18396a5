"""Values of a merged job that may be of any type, as the matrix reads them. Pure."""

from __future__ import annotations

from typing import Any

Section = dict[str, Any]


def texts(value: Any) -> list[str]:
    """The texts in a text or a list; nothing of anything else."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """A whole number, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """What `runner.manifest.Count` takes."""
    return is_number(value) and 1 <= value < 2**31
