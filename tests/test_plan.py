"""The batch arithmetic: the documented table, and steps as transformers counts them."""

from __future__ import annotations

import pytest

from runner.errors import JobError
from runner.manifest import Job
from runner.plan import (
    Geometry,
    batch_record,
    geometry,
    recorded_size,
    sizes,
    smaller,
    steps_per_epoch,
    total_steps,
)
from tests.attempts import JOB, merged


def job(total: int, per_device: int | str) -> Job:
    batch = {"global_batch_size": total, "per_device_train_batch_size": per_device}
    return Job.model_validate(merged(JOB, {"training": batch}))


@pytest.mark.parametrize(
    ("total", "per_device", "world", "accumulation"), [(8, 1, 1, 8), (8, 4, 1, 2), (8, 2, 4, 1), (6, 6, 1, 1)]
)
def test_a_global_batch_is_cut(total: int, per_device: int, world: int, accumulation: int) -> None:
    cut = geometry(job(total, per_device), world)
    assert cut.accumulation == accumulation
    assert cut.per_device * cut.accumulation * cut.world == total


@pytest.mark.parametrize(
    ("total", "asked", "world", "at_most", "per_device"),
    [(8, 4, 1, 3, 2), (8, 4, 1, 8, 4), (8, "auto", 1, None, 8), (8, "auto", 2, 3, 2), (12, "auto", 1, 5, 4)],
)
def test_a_size_is_the_largest_that_may_be(
    total: int, asked: int | str, world: int, at_most: int | None, per_device: int
) -> None:
    cut = geometry(job(total, asked), world, at_most)
    assert cut.per_device == per_device
    assert cut.per_device * cut.accumulation * cut.world == total


def test_more_processes_than_samples_are_refused_for_auto_too() -> None:
    with pytest.raises(JobError, match="use at most 8 processes"):
        geometry(job(8, "auto"), world=16)


def test_sizes_go_down_through_all_that_cut_the_batch() -> None:
    assert sizes(12) == [12, 6, 4, 3, 2, 1]
    assert sizes(12, world=4) == [3, 1]
    assert sizes(2, world=4) == []
    assert sizes(2**31 - 1) == [2**31 - 1, 1]  # at once
    cut = geometry(job(12, "auto"))
    seen = []
    while cut is not None:
        seen.append(cut.per_device)
        assert cut.per_device * cut.accumulation == 12
        cut = smaller(cut)
    assert seen == sizes(12)


@pytest.mark.parametrize(
    ("asked", "record", "size"),
    [
        ("auto", {"per_device": 4, "asked": "auto"}, 4),
        (8, {"per_device": 4, "asked": 8}, 4),
        (2, {"per_device": 8, "asked": 8}, None),
        (2, {"per_device": 8, "asked": "auto"}, None),
        ("auto", None, None),
        ("auto", {"asked": "auto"}, None),
        ("auto", {"per_device": True, "asked": "auto"}, None),
    ],
)
def test_a_recorded_size_holds_while_the_same_is_asked(
    asked: int | str, record: object, size: int | None
) -> None:
    assert recorded_size(job(8, asked), record) == size


def test_a_record_is_read_as_it_is_written() -> None:
    wanted = job(8, "auto")
    assert recorded_size(wanted, batch_record(wanted, geometry(wanted, at_most=4), "single")) == 4


def test_more_processes_make_a_size_smaller() -> None:
    assert geometry(job(8, 4), 4) == Geometry(global_batch_size=8, per_device=2, accumulation=1, world=4)


@pytest.mark.parametrize(
    ("total", "per_device", "world", "usable"), [(8, 3, 1, "[1, 2, 4, 8]"), (8, 4, 3, "at most 8 processes")]
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(
    total: int, per_device: int, world: int, usable: str
) -> None:
    with pytest.raises(JobError) as error:
        geometry(job(total, per_device), world)
    assert usable in str(error.value)


def test_steps_are_counted_as_transformers_counts_them() -> None:
    assert [steps_per_epoch(rows, 8) for rows in (1, 8, 9, 16)] == [1, 1, 2, 2]
    assert total_steps(20, 8, epochs=3, max_steps=-1) == 9
    assert total_steps(20, 8, epochs=1.5, max_steps=-1) == 5
    assert total_steps(20, 8, epochs=3, max_steps=4) == 4
