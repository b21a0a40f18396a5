"""The order of rows: the documented table, and nothing but seed, epoch and position decides."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from runner.train.sampler import GlobalBatchSampler, epoch_order


@pytest.mark.parametrize(
    ("rows", "batch", "length"),
    [(8, 4, 8), (6, 4, 8), (3, 8, 8), (1, 4, 4), (61, 8, 64)],
)
def test_an_epoch_is_whole_global_batches_filled_from_its_own_start(
    rows: int, batch: int, length: int
) -> None:
    order = epoch_order(rows, batch, seed=7, epoch=0)
    assert len(order) == length == len(GlobalBatchSampler(rows, batch, 7))
    assert sorted(order[:rows]) == list(range(rows))
    assert all(order[position] == order[position % rows] for position in range(length))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = epoch_order(50, 8, seed=1, epoch=0)
    assert first == epoch_order(50, 8, seed=1, epoch=0)
    assert first != epoch_order(50, 8, seed=1, epoch=1)
    assert first != epoch_order(50, 8, seed=2, epoch=0)


def test_the_order_is_the_one_a_plain_trl_run_draws() -> None:
    """accelerate's sampler, which transformers' Trainer uses, takes its seed from `torch.manual_seed`."""
    torch.manual_seed(11)
    theirs = SeedableRandomSampler(range(40))
    for epoch in range(3):
        theirs.set_epoch(epoch)
        assert list(theirs) == epoch_order(40, 8, seed=11, epoch=epoch)


def test_the_order_disturbs_no_global_generator() -> None:
    before = torch.random.get_rng_state()
    sampler = GlobalBatchSampler(10, 4, 0)
    sampler.set_epoch(3)
    list(sampler)
    assert torch.equal(before, torch.random.get_rng_state())
