"""Which rows are trained on: every row that is not is named with its reason.

                    on_bad_row: error     on_bad_row: skip
    a bad row       refused               left out, named

                    on_overflow: error    on_overflow: drop     on_overflow: resize
    a row too long  refused               left out, named       its images shrink to fit, else refused

Bad: an image or a text that cannot be used, an empty answer, what the chat template or the processor refuses.
All rows that are refused stand in one error. Token counts are `tokens`'; this module decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset

from runner.errors import DataError
from runner.manifest import Datasets
from runner.train.data.collator import Collator
from runner.train.data.lengths import text_lengths
from runner.train.data.tokens import Counted, TokenCounter, Unfit, spread

SHOWN = 20
"""Rows that one message names; more are counted."""


@dataclass(frozen=True)
class Candidate:
    """A drawn row on its way into training: where it is, and what is known of it."""

    position: int
    """In the concatenation of all sources, undrawn rows included."""
    name: str
    """`path[split] row 123`."""
    problem: str | None
    """Why it cannot be used."""
    notes: tuple[str, ...]
    """What was changed to use it."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of its images in pixels."""
    digest: str
    """Hashes of its text and its images."""
    pictures: str = ""
    """Hash of the images that it shows, in their order; rows of one hash show the same."""
    tokens: int = 0
    """Of the row as it is collated alone."""
    text_tokens: int = 0
    """Of its text alone, each image one placeholder."""
    scale: float = 1.0
    """Factor that its images are shrunk by."""


@dataclass(frozen=True)
class Verdict:
    """All candidates, in order."""

    kept: list[Candidate]
    left_out: list[Candidate]
    """Each with its problem."""


def judge(
    candidates: Sequence[Candidate],
    rows: Dataset,
    collator: Collator,
    policy: Datasets,
    limit: int,
    key: str,
) -> Verdict:
    """Count the tokens of every usable row and apply the job's two policies.

    Args:
        rows: the table that positions point into.
        limit: tokens that a row may have.
        key: `datasets.train` or `datasets.eval`, for messages.

    Raises:
        DataError: a row is refused, or none is left.
    """
    bad = [row for row in candidates if row.problem is not None]
    counted = _counted([row for row in candidates if row.problem is None], rows, collator, policy, limit)
    bad = sorted([*bad, *counted.unfit], key=lambda row: row.position)
    refused = []
    if bad and policy.on_bad_row == "error":
        refused.append(
            f"{_count(len(bad), 'row')} cannot be used:{listed(bad)}\n"
            "  remedy: repair them, or leave them out with datasets.on_bad_row: skip"
        )
    if counted.long and policy.on_overflow != "drop":
        refused.append(
            f"{_count(len(counted.long), 'row')} with more than {limit:,} tokens:{listed(counted.long)}\n"
            f"  remedy: {_REMEDIES[policy.on_overflow]}"
        )
    if refused:
        raise DataError("\n".join(f"{key}: {one}" for one in refused))
    left_out = sorted([*bad, *counted.long], key=lambda row: row.position)
    if not counted.fit:
        raise DataError(f"{key}: no row is left to use:{listed(left_out)}")
    return Verdict(counted.fit, left_out)


_REMEDIES = {
    "error": "raise datasets.max_length if the model allows it, shrink images with model.processor "
    "(for Idefics3: size: {longest_edge: ...}), or choose datasets.on_overflow: drop or resize",
    "resize": "shrinking their images does not help: their text is too long, or the processor scales images "
    "up to a fixed size first. Lower that with model.processor.size (for Idefics3: {longest_edge: ...}), or "
    "choose datasets.on_overflow: drop",
}


def notes(kept: Sequence[Candidate], key: str) -> tuple[str, ...]:
    """One line for every kind of change, with the rows that it befell."""
    by_note: dict[str, list[Candidate]] = defaultdict(list)
    for row in kept:
        for note in dict.fromkeys(row.notes):
            by_note[note].append(row)
    lines = []
    for note, rows in sorted(by_note.items()):
        names = ", ".join(row.name for row in rows[:SHOWN])
        more = f", and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        lines.append(f"{key}: {_count(len(rows), 'row')}: {note}: {names}{more}")
    return tuple(lines)


def listed(rows: Sequence[Candidate]) -> str:
    """The rows with their problems, one a line, the first 20 of them."""
    lines = [f"\n  {row.name}: {row.problem}" for row in rows[:SHOWN]]
    if len(rows) > SHOWN:
        lines.append(f"\n  and {len(rows) - SHOWN:,} more")
    return "".join(lines)


@dataclass(frozen=True)
class _Counted:
    fit: list[Candidate]
    unfit: list[Candidate]
    long: list[Candidate]


def _counted(
    usable: Sequence[Candidate], rows: Dataset, collator: Collator, policy: Datasets, limit: int
) -> _Counted:
    """Usable rows with their tokens; shrunk where the policy is to resize."""
    parted = _Counted([], [], [])
    if not usable:
        return parted
    # Images only where rows are really processed: reading them is what costs.
    text = rows.select_columns([name for name in rows.column_names if name != "images"])
    probes = [_row(rows, usable[number]) for number in spread([row.sizes for row in usable])]
    counter = TokenCounter(collator, probes)
    said = text.select([row.position for row in usable])
    lengths = text_lengths(said, counter, collator.processor, [row.digest for row in usable])
    for row, length in zip(usable, lengths, strict=True):
        what = _row(rows, row) if counter.needs_images else Counted({}, row.sizes)
        tokens = counter.whole(length, what)
        if isinstance(length, Unfit) or isinstance(tokens, Unfit):
            parted.unfit.append(replace(row, problem=str(tokens)))
            continue
        known = replace(row, tokens=tokens, text_tokens=length)
        if tokens <= limit:
            parted.fit.append(known)
        else:
            _fitted(known, _row(text, row), counter, policy, limit, parted)
    return parted


def _fitted(
    row: Candidate,
    what: Counted,
    counter: TokenCounter,
    policy: Datasets,
    limit: int,
    parted: _Counted,
) -> None:
    """Shrink a row that is too long, where that is the policy and helps."""
    fitting = counter.fitting(what, limit) if policy.on_overflow == "resize" else None
    if fitting is None:
        parted.long.append(replace(row, problem=f"{row.tokens:,} tokens"))
        return
    scale, fewer = fitting
    note = f"images shrunk to fit {limit:,} tokens"
    parted.fit.append(replace(row, tokens=fewer, scale=scale, notes=(*row.notes, note)))


def _row(rows: Dataset, row: Candidate) -> Counted:
    known = {"row": row.name, "index": 0, "image_count": len(row.sizes), "scale": row.scale}
    return Counted({**rows[row.position], **known}, row.sizes)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
