"""Runs as rows: what `runner list` says of each, as a table for people and as data for programs. Pure.

    NAME       STATE      STEP    METRIC                          UPDATED  SIZE    WHERE
    my-charts  done       20/20   relaxed accuracy 0.00 -> 0.92   2h ago   1.4 MB  runs/my-charts
    spot       running    13/750  loss 0.4120                     4s ago   8.1 MB  s3://bucket/runs/spot

The states are those of `runner.status.standing`; WHERE is what `runner status` takes. A run that cannot be
read has one of these instead, and its reason below the table:

    broken     its HEAD or its checkpoints are missing or damaged
    denied     one may not look
    silent     its store does not answer
    empty      a folder of a run that never began
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runner.errors import AccessDenied, RunnerError, StorageError
from runner.planning.words import size as bytes_words
from runner.status.standing import Standing, State
from runner.supervisor.progress import point, printable

Trouble = Literal["broken", "denied", "silent", "empty"]

COLUMNS = ("NAME", "STATE", "STEP", "METRIC", "UPDATED", "SIZE", "WHERE")
_NAME, _METRIC, _WHERE = 0, 3, 6
_LEAST = 12
"""Columns that a name or an address keeps, however narrow the terminal."""


@dataclass(frozen=True)
class Size:
    """Bytes."""

    bytes: int
    whole: bool
    """False: at least so many, because not everything was counted."""


@dataclass(frozen=True)
class Row:
    """One run. None is unknown."""

    name: str
    where: str
    """As a person names it."""
    place: str
    """Of its store."""
    state: State | Trouble
    step: int | None = None
    steps: int | None = None
    metrics: Mapping[str, Any] | None = None
    """`before` and `after`, as in result.json."""
    loss: float | None = None
    """Of the newest step."""
    age: float | None = None
    """Seconds since its last word."""
    size: Size | None = None
    exit_code: int | None = None
    problem: str | None = None
    """Why it could not be read."""


def of_standing(name: str, where: str, place: str, here: Standing, size: Size | None) -> Row:
    """The row of a run that could be read."""
    return Row(
        name=name,
        where=where,
        place=place,
        state=here.state,
        step=here.step,
        steps=here.steps,
        metrics=here.metrics,
        loss=None if here.loss is None else here.loss.last,
        age=here.lease_age,
        size=size,
        exit_code=here.exit_code,
    )


def of_trouble(name: str, where: str, place: str, why: RunnerError | Trouble, problem: str | None) -> Row:
    """The row of a run that could not.

    AccessDenied       denied
    StorageError       silent
    any other          broken
    Trouble itself     that
    """
    if isinstance(why, RunnerError):
        words: dict[type[RunnerError], Trouble] = {AccessDenied: "denied", StorageError: "silent"}
        why = words.get(type(why), "broken")
    return Row(name=name, where=where, place=place, state=why, problem=problem)


def newest_first(rows: Iterable[Row]) -> list[Row]:
    """Each place once, the first of it; by age, those of unknown age last, by name."""
    once = {row.place: row for row in reversed(list(rows))}
    return sorted(once.values(), key=lambda row: (row.age is None, row.age or 0.0, row.name))


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """`list --json`."""
    found = []
    for row in rows:
        size: dict[str, Any] = {"bytes": None, "bytes_whole": None}
        if row.size is not None:
            size = {"bytes": row.size.bytes, "bytes_whole": row.size.whole}
        fields = dataclasses.asdict(row)
        del fields["size"]
        found.append({**fields, **size})
    return {"format": 1, "runs": found}


def table(rows: Sequence[Row], width: int | None) -> str:
    """For people.

    Args:
        width: columns of the terminal; None: there is none, and nothing is shortened.
    """
    return "\n".join(aligned([COLUMNS, *fitted([_cells(row) for row in rows], width)]))


def fitted(cells: list[list[str]], width: int | None) -> list[list[str]]:
    """Cells that fit a terminal, as far as they can. In this order, until they do:

    METRIC    without the name of the metric: 0.00 -> 0.92
    WHERE     without its beginning, which is alike in most: ...runs/spot
    NAME      without its end: my-very-long-na...
    """
    if width is None or _width(cells) <= width:
        return cells
    cells = [[*row[:_METRIC], _bare(row[_METRIC]), *row[_METRIC + 1 :]] for row in cells]
    for column, cut in ((_WHERE, _end_of), (_NAME, _beginning_of)):
        excess = _width(cells) - width
        if excess > 0:
            room = max(_LEAST, max(len(row[column]) for row in cells) - excess)
            cells = [[*row[:column], cut(row[column], room), *row[column + 1 :]] for row in cells]
    return cells


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of words, two blanks between them."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _cells(row: Row) -> list[str]:
    step = "-" if row.step is None else f"{row.step}/{'?' if row.steps is None else row.steps}"
    size = "-" if row.size is None else f"{'' if row.size.whole else '>'}{bytes_words(row.size.bytes)}"
    return [
        printable(cell) for cell in (row.name, row.state, step, _metric(row), ago(row.age), size, row.where)
    ]


def _metric(row: Row) -> str:
    """What a person looks at first.

        after       loss       before     shown
        known       -          -          relaxed accuracy 0.00 -> 0.92
        unknown     known      -          loss 0.4120
        unknown     unknown    known      relaxed accuracy 0.00 -> -
        unknown     unknown    unknown    -

    Of several metrics the first.
    """
    before, after = ((row.metrics or {}).get(when) or {} for when in ("before", "after"))
    if not after and row.loss is not None:
        return f"loss {row.loss:.4f}"
    name = next((name for name, value in {**before, **after}.items() if value is not None), None)
    if name is None:
        return "-"
    return f"{name.replace('_', ' ')} {point(before.get(name))} -> {point(after.get(name))}"


def ago(seconds: float | None) -> str:
    """`4s ago`, `5m ago`, `3h ago`, `12d ago`."""
    if seconds is None:
        return "-"
    for unit, length, most in (("s", 1, 90), ("m", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds // length:.0f}{unit} ago"
    return f"{seconds // 86400:.0f}d ago"


def _width(cells: Sequence[Sequence[str]]) -> int:
    return max(map(len, aligned([COLUMNS, *cells])))


def _bare(metric: str) -> str:
    """A change without the name of what changed."""
    start = metric.find("->")
    words = metric[:start].split()
    return metric if start < 0 or len(words) < 2 else f"{words[-1]} {metric[start:]}"


def _end_of(text: str, room: int) -> str:
    return text if len(text) <= room else f"...{text[len(text) - room + 3 :]}"


def _beginning_of(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
