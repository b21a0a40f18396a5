"""Which rows an optimizer step sees: a pure function of the seed, the epoch and the position.

One permutation per epoch, `torch.randperm` from a generator seeded with `seed + epoch`, which is what a
plain TRL run draws (accelerate's `SeedableRandomSampler`). When the rows do not fill the last global
batch, it is filled with the first rows of the same permutation, and with further passes over it where a
batch is larger than the data. So the rows of a step depend on nothing else: not on the per-device size,
not on the number of processes, not on a resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def epoch_order(rows: int, global_batch_size: int, seed: int, epoch: int) -> list[int]:
    """Row indices of one epoch, a whole number of global batches.

    rows  batch  order
       8      4  a permutation of 8
       6      4  a permutation of 6, then its first 2
       3      8  a permutation of 3, twice, then its first 2
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    missing = -rows % global_batch_size
    repeats = 1 + -(-missing // rows)
    return (order * repeats)[: rows + missing]


class GlobalBatchSampler(Sampler[int]):
    """Yields `epoch_order`; the trainer tells it the epoch before every pass."""

    def __init__(self, rows: int, global_batch_size: int, seed: int) -> None:
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.rows, self.global_batch_size, self.seed, self.epoch))

    def __len__(self) -> int:
        return self.rows + -self.rows % self.global_batch_size
