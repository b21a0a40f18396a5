"""The orders of rows: the documented tables, and nothing but rows, seed, epoch and position decides."""

from __future__ import annotations

import math
import random

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from runner.train.sampler import GlobalBatchSampler, Order, _laid_out, by_image, by_length, epoch_order


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


def tiles(width: int, height: int) -> int:
    """Image tokens of SmolVLM, whose charts are scaled up to four tiles of 384 along the longer side."""
    scale = 4 * 384 / max(width, height)
    return 84 + math.ceil(height * scale / 384) * (83 * math.ceil(width * scale / 384) + 1)


def charts(images: int, questions: list[int]) -> tuple[list[int], list[str]]:
    """Lengths and pictures of ChartQA-like rows, each image with one of so many questions."""
    chance = random.Random(images)
    lengths, pictures = [], []
    for image in range(images):
        tokens = tiles(
            chance.choice([850, 850, 800, 422, 310, 1000]), chance.choice([600, 557, 500, 700, 400])
        )
        for _ in range(chance.choice(questions)):
            lengths.append(tokens + chance.randint(15, 60))
            pictures.append(f"image {image}")
    return lengths, pictures


def padding(order: list[int], lengths: list[int], per_device: int) -> float:
    """The share of tokens that are padding, in micro-batches of so many rows."""
    batches = [order[start : start + per_device] for start in range(0, len(order), per_device)]
    padded = sum(per_device * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for row in order) / padded


def encoded(order: list[int], pictures: list[str], per_device: int) -> int:
    """Images that are encoded in an epoch, where a micro-batch encodes each of its images once."""
    batches = [order[start : start + per_device] for start in range(0, len(order), per_device)]
    return sum(len({pictures[row] for row in batch}) for batch in batches)


def log_normal(rows: int, sigma: float) -> list[int]:
    chance = random.Random(rows)
    return [max(8, int(chance.lognormvariate(6, sigma))) for _ in range(rows)]


LENGTHS = {
    "charts": charts(1500, [1, 1, 2, 2, 2, 3, 4])[0],
    "log-normal, 0.5": log_normal(5000, 0.5),
    "log-normal, 0.8": log_normal(5000, 0.8),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("per_device", [2, 4, 8])
def test_rows_by_length_have_less_than_five_per_cent_of_padding(lengths: list[int], per_device: int) -> None:
    for epoch in range(2):
        assert padding(by_length(lengths, 32, 3, epoch), lengths, per_device) < 0.05
    assert padding(epoch_order(len(lengths), 32, 3, 0), lengths, per_device) > 0.05


@pytest.mark.parametrize(("images", "batch"), [(1, 4), (3, 8), (40, 8), (40, 6), (300, 32), (900, 16)])
def test_every_order_takes_the_same_rows_in_other_places(images: int, batch: int) -> None:
    lengths, pictures = charts(images, [1, 2, 3, 5, 9])
    for epoch in range(3):
        drawn = epoch_order(len(lengths), batch, 5, epoch)
        arranged = [by_length(lengths, batch, 5, epoch), by_image(lengths, pictures, batch, 5, epoch)]
        for order in arranged:
            assert sorted(order) == sorted(drawn)
        if len(drawn) > 4 * batch:
            assert len({tuple(order) for order in [drawn, *arranged]}) == 3
    assert by_image(lengths, pictures, batch, 5, 0) == by_image(lengths, pictures, batch, 5, 0)


def test_global_batches_are_shuffled_and_made_anew_every_epoch() -> None:
    lengths, pictures = charts(1000, [1, 2, 3])
    for draw in (
        lambda epoch: by_length(lengths, 16, 5, epoch),
        lambda epoch: by_image(lengths, pictures, 16, 5, epoch),
    ):
        epochs = [
            [tuple(order[at : at + 16]) for at in range(0, len(order), 16)] for order in map(draw, (0, 1))
        ]
        assert not {frozenset(batch) for batch in epochs[0]} & {frozenset(batch) for batch in epochs[1]}
        longest = [max(lengths[row] for row in batch) for batch in epochs[0]]
        assert longest != sorted(longest)


@pytest.mark.parametrize(("size", "batch"), [(1, 32), (2, 32), (4, 32), (8, 32), (3, 24), (5, 20)])
def test_groups_of_one_size_are_never_torn(size: int, batch: int) -> None:
    lengths, pictures = charts(64 * 5, [size])
    order = by_image(lengths, pictures, batch, 1, 0)[: len(lengths)]
    for per_device in (size, 2 * size, batch):
        assert encoded(order, pictures, per_device) == 64 * 5
    assert padding(order, lengths, 8) < 0.05


def test_few_groups_of_many_sizes_are_torn() -> None:
    """Charts with one to four questions: what is encoded, as a multiple of the images that there are."""
    lengths, pictures = charts(1500, [1, 1, 2, 2, 2, 3, 4])
    order = by_image(lengths, pictures, 32, 1, 0)
    shuffled = epoch_order(len(lengths), 32, 1, 0)
    for per_device, most in ((4, 1.1), (8, 1.08), (16, 1.06), (32, 1.03)):
        assert encoded(order, pictures, per_device) < most * 1500
        assert encoded(shuffled, pictures, per_device) > 1.9 * 1500
        assert padding(order, lengths, per_device) < 0.05


@pytest.mark.parametrize(
    ("groups", "order"),
    [
        (["aaaa", "bbbb"], "aaaabbbb"),
        (["aa", "bbb", "c", "dd"], "bbbcaadd"),
        (["aaa", "bbb", "cc"], "aaacbbbc"),
        (["aaa", "bbb", "c", "d"], "aaacbbbd"),
    ],
)
def test_groups_stand_where_micro_batches_leave_them_whole(groups: list[str], order: str) -> None:
    """The table of `_laid_out`."""
    rows = iter(range(8))
    numbers = [[next(rows) for _ in group] for group in groups]
    names = dict(enumerate("".join(groups)))
    assert "".join(names[row] for row in _laid_out(numbers, [1] * 8, 8)) == order


def test_a_block_that_the_end_cuts_short_stays_there() -> None:
    assert _laid_out([[0, 1, 2], [3, 4], [5]], [5, 5, 5, 1, 1, 5], 6) == [0, 1, 2, 5, 3, 4]


def test_batches_of_one_window_are_shuffled() -> None:
    lengths, pictures = charts(100, [2])
    for order in (by_length(lengths, 8, 5, 0), by_image(lengths, pictures, 8, 5, 0)):
        longest = [max(lengths[row] for row in order[at : at + 8]) for at in range(0, 200, 8)]
        assert longest != sorted(longest)


def test_a_group_larger_than_a_global_batch_fills_whole_ones() -> None:
    lengths, pictures = [5] * 20, ["one"] * 18 + ["two"] * 2
    order = by_image(lengths, pictures, 8, 0, 0)
    batches = [{pictures[row] for row in order[at : at + 8]} for at in range(0, 24, 8)]
    assert batches.count({"one"}) >= 2


def test_rows_that_show_nothing_are_no_group() -> None:
    """Rows of text among charts: each goes where its length belongs."""
    lengths, pictures = charts(300, [2])
    lengths += log_normal(2000, 0.8)
    order = by_image(lengths, [*pictures, *[None] * 2000], 32, 1, 0)
    assert padding(order, lengths, 8) < 0.05


@pytest.mark.parametrize("order", ["shuffled", "by_length", "by_image"])
def test_the_sampler_yields_the_order_that_the_job_names(order: Order) -> None:
    lengths, pictures = charts(30, [1, 3])
    sampler = GlobalBatchSampler(len(lengths), 8, 2, order, lengths, pictures)
    sampler.set_epoch(1)
    wanted = {
        "shuffled": epoch_order(len(lengths), 8, 2, 1),
        "by_length": by_length(lengths, 8, 2, 1),
        "by_image": by_image(lengths, pictures, 8, 2, 1),
    }
    assert list(sampler) == wanted[order]
    assert len(sampler) == len(wanted[order])
