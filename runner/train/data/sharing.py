"""Which rows of a batch show the same images, and how many tokens they begin with alike. Pure.

A pair's two answers follow one prompt; several questions are asked about one image.
`runner.train.models.shared` encodes such images once and runs such rows as one sequence, from what is found
here:

    batch row    0  1  2  3        of pairs: chosen 0, 1, then rejected 0, 1
    shows        0  1  0  1        its image set, a row of the batch's pixel values
    sequences    (0, 2), (1, 3)    rows that run as one, over one copy of their common prefix

A prefix ends before the first token of any of its rows that carries loss, and holds all of their images; rows
without such a prefix run each on its own. So do all rows of a batch whose sequences, padded to the longest of
them, would be more tokens than the rows: long answers behind a short prefix, beside rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Branches:
    """Rows that run as one sequence."""

    rows: tuple[int, ...]
    """Of the batch, ascending."""
    prefix: int
    """Tokens that all of them begin with; 0 of a single row."""


@dataclass(frozen=True)
class Sharing:
    """What the rows of a batch have in common."""

    shows: tuple[int, ...]
    """The image set of every row."""
    counts: tuple[int, ...]
    """Images of every set."""
    lengths: tuple[int, ...]
    """Tokens of every row, without padding."""
    sequences: tuple[Branches, ...]
    """Every row once, ordered by their first rows."""

    @property
    def packs(self) -> bool:
        """Whether any rows run as one."""
        return len(self.sequences) < len(self.shows)


def image_sets(pictures: Sequence[str | None]) -> list[int]:
    """The number of every row's image set, in the order of their first rows.

    Args:
        pictures: what each row shows, by a name; None: nothing, and no other row shares that.
    """
    numbers: dict[str | int, int] = {}
    return [
        numbers.setdefault(position if name is None else name, len(numbers))
        for position, name in enumerate(pictures)
    ]


def found(
    shows: Sequence[int],
    counts: Sequence[int],
    ids: torch.Tensor,
    attended: torch.Tensor,
    carries_loss: torch.Tensor,
    image_token: int,
    *,
    prefixes: bool,
) -> Sharing:
    """What rows have in common.

    Args:
        shows: the image set of every row.
        counts: images of every set.
        ids: int64 (R, T), padded right.
        attended: int64 (R, T), 1 for tokens and 0 for padding.
        carries_loss: bool (R, T).
        image_token: what images are expanded to.
        prefixes: whether rows may run as one.
    """
    lengths = attended.sum(dim=1).tolist()
    sequences: list[Branches] = []
    for images in range(len(counts)):
        rows = [row for row, shown in enumerate(shows) if shown == images]
        prefix = _prefix(rows, lengths, ids, carries_loss, image_token) if prefixes and len(rows) > 1 else 0
        sequences += [Branches(tuple(rows), prefix)] if prefix else [Branches((row,), 0) for row in rows]
    longest = max(_tokens(one, lengths) for one in sequences)
    if len(sequences) * longest > len(lengths) * max(lengths):
        sequences = [Branches((row,), 0) for row in range(len(lengths))]
    sequences.sort(key=lambda one: one.rows[0])
    return Sharing(tuple(shows), tuple(counts), tuple(lengths), tuple(sequences))


def _tokens(one: Branches, lengths: Sequence[int]) -> int:
    """Of a sequence; the prefix's last token stands in every branch."""
    shared = max(one.prefix - 1, 0)
    return shared + sum(lengths[row] - shared for row in one.rows)


def _prefix(
    rows: list[int],
    lengths: Sequence[int],
    ids: torch.Tensor,
    carries_loss: torch.Tensor,
    image_token: int,
) -> int:
    """Tokens that all rows begin with, 0 where that is not worth a sequence of their own."""
    answers = carries_loss[rows].any(dim=0)
    # Behind the prefix every row has a token left, or there is nothing to predict.
    most = min(min(lengths[row] for row in rows) - 1, int(answers.int().argmax()) if answers.any() else 0)
    same = (ids[rows, :most] == ids[rows[0], :most]).all(dim=0)
    prefix = most if bool(same.all()) else int(same.int().argmin())
    behind = ids[rows, prefix:] == image_token
    return 0 if prefix < 2 or bool(behind.any()) else prefix
