"""Which rows an optimizer step sees: a pure function of the rows, the seed, the epoch and the position.

    order      an epoch
    shuffled   one permutation of the rows
    by_length  the same rows; windows of `WINDOW` global batches or more are sorted by length and cut into
               global batches, which are shuffled
    by_image   the same with groups, the rows that show the same images, in place of rows; see `by_image`

The permutation is `torch.randperm` from a generator seeded with `seed + epoch`, which is what a
plain TRL run draws (accelerate's `SeedableRandomSampler`). When the rows do not fill the last global
batch, it is filled with the first rows of the same permutation, and with further passes over it where a
batch is larger than the data. All three orders take these rows, each as often. So the rows of a step depend
on nothing else: not on the per-device size, not on the number of processes, not on a resume.

A micro-batch is a slice of its global batch by position, whatever its size. Rows of like length therefore
stand side by side in a global batch, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.utils.data import Sampler

Order = Literal["shuffled", "by_length", "by_image"]
"""`datasets.order`."""

WINDOW = 50
"""Global batches that are sorted together, at least: transformers' own number (`get_length_grouped_indices`).
So many that one holds rows of the same fiftieth of all lengths; so few that a large epoch has several windows
and what a batch is made of is drawn anew every time. An epoch is divided evenly, because a short window at
its end would pad more than the others. One of fewer than two windows is a single one: its batches change with
the epoch only where lengths are equal, but for their order."""

LOOKAHEAD = 2
"""Global batches of rows in which `by_image` looks for a group that fills what is left of one. A group from
further away would be so much longer that its padding cost more than the image that is encoded again."""


def epoch_order(rows: int, global_batch_size: int, seed: int, epoch: int) -> list[int]:
    """Row indices of one epoch, a whole number of global batches.

    rows  batch  order
       8      4  a permutation of 8
       6      4  a permutation of 6, then its first 2
       3      8  a permutation of 3, twice, then its first 2
    """
    return _drawn(rows, global_batch_size, _generator(seed, epoch))


def by_length(lengths: Sequence[int], global_batch_size: int, seed: int, epoch: int) -> list[int]:
    """The rows of `epoch_order`, where a global batch, and every slice of one, holds rows of like length.

    Args:
        lengths: tokens of every row.
    """
    generator = _generator(seed, epoch)
    drawn = _drawn(len(lengths), global_batch_size, generator)
    window = _window(len(drawn), global_batch_size)
    ordered: list[int] = []
    for start in range(0, len(drawn), window):
        # Stable: rows of one length stay shuffled.
        ordered += sorted(drawn[start : start + window], key=lengths.__getitem__)
    batches = [
        ordered[start : start + global_batch_size] for start in range(0, len(ordered), global_batch_size)
    ]
    return _shuffled(batches, generator)


def by_image(
    lengths: Sequence[int], pictures: Sequence[str | None], global_batch_size: int, seed: int, epoch: int
) -> list[int]:
    """The rows of `epoch_order`, where rows that show the same images stand side by side.

    A group is as long as its longest row. Groups are sorted in windows as rows are in `by_length`; what is
    left of a window that makes no global batch goes into the next one. A global batch takes the next groups
    in turn while they fit, then the first that fit of those within `LOOKAHEAD`. Where none does, the next
    group is torn in two, as is one larger than a global batch; groups of one size that divides the global
    batch never are. How groups stand in a global batch is `_laid_out`'s. The rows that fill the last global
    batch are groups of their own.

    Args:
        lengths: tokens of every row.
        pictures: equal where rows show the same images; None: nothing, and such a row is a group of its own.
    """
    generator = _generator(seed, epoch)
    drawn = _drawn(len(lengths), global_batch_size, generator)
    window = _window(len(drawn), global_batch_size)
    batches: list[list[int]] = []
    waiting: list[list[int]] = []
    rows = 0
    for group in _groups(drawn, pictures, global_batch_size):
        waiting.append(group)
        rows += len(group)
        if rows >= window:
            waiting = _cut(waiting, lengths, global_batch_size, batches)
            rows = sum(map(len, waiting))
    _cut(waiting, lengths, global_batch_size, batches)
    return _shuffled(batches, generator)


def _generator(seed: int, epoch: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return generator


def _drawn(rows: int, global_batch_size: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    missing = -rows % global_batch_size
    repeats = 1 + -(-missing // rows)
    return (order * repeats)[: rows + missing]


def _window(rows: int, global_batch_size: int) -> int:
    """Rows that are sorted together, whole global batches of them."""
    batches = rows // global_batch_size
    windows = max(1, batches // WINDOW)
    return -(-batches // windows) * global_batch_size


def _shuffled(batches: Sequence[list[int]], generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [row for batch in order for row in batches[batch]]


def _groups(drawn: Sequence[int], pictures: Sequence[str | None], most: int) -> list[list[int]]:
    """Rows that show the same images, at most `most` together, in the order in which they were drawn."""
    groups: dict[tuple[int, str | int], list[int]] = {}
    for position, row in enumerate(drawn):
        shown = pictures[row]
        groups.setdefault((position // len(pictures), row if shown is None else shown), []).append(row)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def _cut(
    groups: list[list[int]], lengths: Sequence[int], size: int, batches: list[list[int]]
) -> list[list[int]]:
    """Add as many whole global batches of the groups as they make to `batches`; returns the rest."""
    left = sorted(groups, key=lambda group: _longest(group, lengths))
    rows = sum(map(len, left))
    while rows >= size:
        taken: list[list[int]] = []
        room, passed, at = size, 0, 0
        while room and at < len(left) and passed < LOOKAHEAD * size:
            if len(left[at]) <= room:
                taken.append(left.pop(at))
                room -= len(taken[-1])
            else:
                passed += len(left[at])
                at += 1
        if room:
            taken.append(left[0][:room])
            left[0] = left[0][room:]
        batches.append(_laid_out(taken, lengths, size))
        rows -= size
    return left


def _laid_out(groups: list[list[int]], lengths: Sequence[int], size: int) -> list[int]:
    """The groups of one global batch in such places that few are torn when it is sliced into micro-batches.

    Groups of one size stand in a row, sorted by length. Where sizes differ, the block of a group is the
    smallest power of two that holds it. The groups go, the largest block and of equal ones the largest group
    first, to the first place where their rows lie within one block that starts at a multiple of its size:
    micro-batches of that power of two, and of its multiples, leave them whole. Groups for which no such place
    is left are spread over what is free, in their order. At the end the blocks of the largest group's size
    change places, so that they are sorted by length.

        sizes      in places of 8    torn by micro-batches of 4
        4 4        aaaabbbb          none
        2 3 1 2    bbbcaadd          none
        3 3 2      aaacbbbc          c, for which no place of two is left
    """
    by_length = sorted(groups, key=lambda group: _longest(group, lengths))
    if len({len(group) for group in groups}) == 1:
        return [row for group in by_length for row in group]
    largest = max(_block(group) for group in groups)
    places: list[int | None] = [None] * size
    spread: list[int] = []
    start, rows = 0, 0
    for group in sorted(by_length, key=lambda group: (-_block(group), -len(group))):
        # Where no place was for one of the same size, there is none now.
        start, rows = (start if len(group) == rows else 0), len(group)
        start = _place(places, rows, _block(group), start)
        if start == size:
            spread += group
        else:
            places[start : start + rows] = group
    rest = iter(spread)
    full = [next(rest) if row is None else row for row in places]
    blocks = [full[start : start + largest] for start in range(0, size, largest)]
    # One that is cut short by the end of the batch stays there.
    blocks.sort(key=lambda block: (len(block) < largest, _longest(block, lengths)))
    return [row for block in blocks for row in block]


def _place(places: Sequence[int | None], rows: int, block: int, begin: int) -> int:
    """The first free run of so many places within one block, from `begin` on; the end where there is none."""
    for first in range(begin - begin % block, len(places), block):
        for start in range(max(first, begin), min(first + block, len(places)) - rows + 1):
            if all(place is None for place in places[start : start + rows]):
                return start
    return len(places)


def _block(group: Sequence[int]) -> int:
    return 1 << (len(group) - 1).bit_length()


def _longest(group: Sequence[int], lengths: Sequence[int]) -> int:
    return max(lengths[row] for row in group)


class GlobalBatchSampler(Sampler[int]):
    """Yields an order, epoch after epoch; the trainer tells it the epoch before every pass.

    Args:
        lengths, pictures: of every row, where the order asks for them.
    """

    def __init__(
        self,
        rows: int,
        global_batch_size: int,
        seed: int,
        order: Order = "shuffled",
        lengths: Sequence[int] = (),
        pictures: Sequence[str | None] = (),
    ) -> None:
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.order: Order = order
        self.lengths = lengths
        self.pictures = pictures
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        at = (self.global_batch_size, self.seed, self.epoch)
        match self.order:
            case "shuffled":
                return iter(epoch_order(self.rows, *at))
            case "by_length":
                return iter(by_length(self.lengths, *at))
            case "by_image":
                return iter(by_image(self.lengths, self.pictures, *at))

    def __len__(self) -> int:
        return self.rows + -self.rows % self.global_batch_size
