"""The batch arithmetic: the documented table, and steps as transformers counts them."""

from __future__ import annotations

import pytest

from runner.errors import JobError
from runner.manifest import Job
from runner.plan import geometry, steps_per_epoch, total_steps
from tests.attempts import JOB, merged


def job(total: int, per_device: int) -> Job:
    sizes = {"global_batch_size": total, "per_device_train_batch_size": per_device}
    return Job.model_validate(merged(JOB, {"training": sizes}))


@pytest.mark.parametrize(
    ("total", "per_device", "world", "accumulation"), [(8, 1, 1, 8), (8, 4, 1, 2), (8, 2, 4, 1), (6, 6, 1, 1)]
)
def test_a_global_batch_is_cut(total: int, per_device: int, world: int, accumulation: int) -> None:
    cut = geometry(job(total, per_device), world)
    assert cut.accumulation == accumulation
    assert cut.per_device * cut.accumulation * cut.world == total


@pytest.mark.parametrize(
    ("total", "per_device", "world", "usable"), [(8, 3, 1, "[1, 2, 4, 8]"), (8, 4, 4, "[1, 2]")]
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
