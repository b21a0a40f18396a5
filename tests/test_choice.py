"""What `launch.strategy: auto` takes where there are GPUs of a known size; the size is told by a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner.manifest import Job
from runner.plan import geometry
from runner.supervisor.choice import capacity, chosen
from runner.supervisor.notices import Notices
from tests.attempts import planned

GIB = 2**30


@pytest.mark.parametrize(
    ("said", "size"),
    [("24564\n15360\n", 15360), ("[N/A]\n", None), ("", None)],
)
def test_the_smallest_gpu_is_what_there_is(said: str, size: int | None) -> None:
    found = capacity([sys.executable, "-c", f"print({said!r}, end='')"])
    assert found == (None if size is None else int(size * 2**20 * 0.97))


def test_a_machine_that_cannot_tell_has_none() -> None:
    assert capacity(["/nonexistent/nvidia-smi"]) is None
    assert capacity([sys.executable, "-c", "raise SystemExit(9)"]) is None


def test_the_choice_follows_what_the_job_needs(tmp_path: Path) -> None:
    plan = planned(tmp_path / "run", {})
    cut = geometry(plan.job, 2)
    with Notices() as notices:

        def choice(job: Job, world: int, has: int | None) -> str | None:
            found = chosen(job, cut if world == 2 else geometry(job), plan.fetched, tmp_path, notices, has)
            return None if found is None else found.strategy

        assert choice(plan.job, 1, GIB) is None
        assert choice(plan.job, 2, None) is None
        assert choice(plan.job, 2, 40 * GIB) == "ddp"
        assert choice(plan.job, 2, 1) == "zero3"
        named = plan.job.model_copy(
            update={"launch": plan.job.launch.model_copy(update={"strategy": "zero2"})}
        )
        assert choice(named, 2, 40 * GIB) is None
