"""Running out of memory as the supervisor sees it: a smaller micro-batch, one restart, the same run.

The trainer is tests/fake_rank.py, whose end says whether a step was lost or done twice. Where this machine
lets a control group be made, the kernel itself does the killing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RunnerError
from runner.manifest import Job
from runner.plan import Plan, geometry
from runner.supervisor import cgroup
from runner.supervisor.attempt import Ended, Seen
from runner.supervisor.ranks import Exit
from runner.supervisor.verdict import Outcome, memory_levers, smaller_batch
from tests.small_job import SMALL
from tests.test_launch import RANK, SCRIPT, Bench, at

PER_DEVICE = "training.per_device_train_batch_size"
PAIRS = {"datasets": {"train": [{"path": "demo:charts", "format": "preference"}]}, "method": "dpo"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    code, output = bench.train()
    assert code == 0, output
    return bench.weights()


def full(place: str, above: int, attempt: int | None = None) -> dict[str, Any]:
    """The trainer says that more than `above` rows do not fit there."""
    return {**at(place, "full", attempt), "above": above}


def sizes(bench: Bench) -> list[tuple[int, bool]]:
    """Per-device size and whether it was to be probed, of every attempt's plan."""
    plans = sorted((bench.run / "attempts").iterdir(), key=lambda folder: int(folder.name))
    read = [Plan.model_validate_json((folder / "plan.json").read_text()) for folder in plans]
    return [(plan.geometry.per_device, plan.probe) for plan in read]


# --- a whole run ---


def test_each_out_of_memory_costs_one_restart_with_the_next_smaller_size(
    bench: Bench, undisturbed: str
) -> None:
    """At the first step, in the middle, and at the first step after a resume; every size is said."""
    code, output = bench.train(full("step:1", 4, 1), full("step:5", 2, 2), full("step:5", 1, 3))
    assert code == 0, output
    assert bench.weights() == undisturbed
    assert sizes(bench) == [(8, True), (4, False), (2, False), (1, False)]
    told = [(one["step"], one["per_device"]) for one in bench.result()["restarts"]]
    assert told == [(0, {"from": 8, "to": 4}), (4, {"from": 4, "to": 2}), (4, {"from": 2, "to": 1})]
    for one in bench.result()["restarts"]:
        assert one["reason"].startswith("out of memory in step ")
    assert (
        "goes on from checkpoint 00000004-000001-0002, step 4, with 2 rows per device instead of 4" in output
    )


def test_a_number_is_a_wish_and_goes_down_too(bench: Bench, undisturbed: str) -> None:
    code, output = bench.train(full("step:4", 2), overrides=(f"{PER_DEVICE}=4",))
    assert code == 0, output
    assert bench.weights() == undisturbed
    assert sizes(bench) == [(4, False), (2, False)]


def test_it_is_no_crash_without_progress(bench: Bench) -> None:
    """Three times in one step, and then a crash in it: the first crash, which is forgiven."""
    code, output = bench.train(full("step:3", 1), at("step:3", "kill", attempt=4))
    assert code == 0, output
    assert [one["per_device"] is None for one in bench.result()["restarts"]] == [False] * 3 + [True]


def test_one_row_that_does_not_fit_is_1_with_the_largest_lever_first(bench: Bench) -> None:
    code, output = bench.train(full("step:3", 0))
    assert code == 1
    assert bench.result()["outcome"] == "failed"
    assert bench.result()["exit_code"] == 1
    assert bench.result()["steps"] == 2
    assert [size for size, _ in sizes(bench)] == [8, 4, 2, 1]
    assert "in step 3: a micro-batch of a single row does not fit the memory (it does not fit)" in output
    assert "Remedy, the largest lever first: a lora section" in output


def test_the_size_is_in_the_committed_state_for_the_next_command(bench: Bench, undisturbed: str) -> None:
    assert bench.train(full("step:3", 2), at("step:5", "crash:65", attempt=3))[0] == 65
    code, output = bench.train()
    assert code == 0, output
    assert bench.weights() == undisturbed
    assert sizes(bench) == [(8, True), (4, False), (2, False), (2, False)]


@pytest.mark.parametrize(("wish", "then"), [("2", (2, False)), ("8", (8, False))])
def test_another_wish_is_granted(bench: Bench, wish: str, then: tuple[int, bool]) -> None:
    assert bench.train(full("step:3", 4), at("step:5", "crash:65"), at("step:5", "crash:65", 2))[0] == 65
    code, output = bench.train(overrides=(f"{PER_DEVICE}={wish}",))
    assert code == 0, output
    assert f'changed since the run began: {PER_DEVICE}: "auto" -> {wish}' in output
    assert sizes(bench)[-1] == then


def test_a_size_that_was_found_is_not_looked_for_again(bench: Bench) -> None:
    assert bench.train(at("step:1", "kill"))[0] == 0
    assert sizes(bench) == [(8, True), (8, False)]


# --- by the kernel ---


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A memory control group below this process's own, with a limit in bytes."""
    lines = cgroup.OWN.read_text().splitlines()
    paths = [line.split(":", 2)[2] for line in lines if line.split(":", 2)[1] == "memory"]
    if not paths:
        pytest.skip("no control group of version 1 counts memory here")
    folder = cgroup.ROOT / "memory" / paths[0].lstrip("/") / f"runner-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"this machine lets nobody make a control group: {error}")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        yield folder
    finally:
        deadline = time.monotonic() + 10
        while (folder / "cgroup.procs").read_text().strip():  # the dying
            assert time.monotonic() < deadline
            time.sleep(0.01)
        folder.rmdir()


SUPERVISOR = """
import json, os, sys
from pathlib import Path
group, job, runs, trainer = sys.argv[1:]
Path(group, "cgroup.procs").write_text(str(os.getpid()))
ballast = b"x" * (192 << 20)
from runner import launch
from runner.settings import resolve
sys.exit(launch.train(resolve(job, [], {}), Path(runs), trainer=json.loads(trainer)))
"""
"""A process of its own, and the larger one when memory ends: it is the trainer that the kernel shall kill."""


@pytest.mark.parametrize("place", ["probe", "step:4"])
def test_a_kill_by_the_control_group_is_out_of_memory(bench: Bench, undisturbed: str, place: str) -> None:
    fault = {**at(place, "eat", attempt=None), "above": 2}
    script = {**SCRIPT, "faults": [fault]}
    job = bench.path / "job.yaml"
    job.write_text(json.dumps(bench.job))
    with control_group(320 << 20) as group:
        arguments = [group, job, bench.runs, json.dumps([sys.executable, str(RANK), json.dumps(script)])]
        done = subprocess.run(
            [sys.executable, "-c", SUPERVISOR, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(RANK.parents[1])},
            cwd=bench.path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert bench.weights() == undisturbed
    probed = place == "probe"
    assert sizes(bench) == [(8, True), (4, probed), (2, probed)]
    first = bench.result()["restarts"][0]
    assert first["per_device"] == {"from": 8, "to": 4}
    where = "in phase probe" if probed else "in step 4"
    assert (
        first["reason"] == f"out of memory {where}: SIGKILL by the kernel: its control group is out of memory"
    )


def test_a_kill_by_somebody_is_a_crash(bench: Bench, undisturbed: str) -> None:
    assert bench.train(at("step:4", "kill"))[0] == 0
    assert bench.weights() == undisturbed
    assert bench.result()["restarts"][0]["per_device"] is None
    assert sizes(bench) == [(8, True), (8, False)]


@pytest.mark.parametrize(
    ("said", "killed", "phase", "answer"),
    [
        ("out_of_memory", False, "train", True),
        ("failed", False, "train", False),
        ("failed", True, "train", False),
        (None, True, "probe", True),
        (None, True, "train", True),
        (None, True, "save", True),
        (None, True, "evaluate_before", False),
        (None, True, "load", False),
        (None, False, "train", False),
    ],
)
def test_out_of_memory_table(said: str | None, killed: bool, phase: str, answer: bool) -> None:
    outcome = None if said is None else Outcome(outcome=said, exit_code=1)
    seen = Seen(phase=phase, step=3)
    ended = Ended(Exit(-signal.SIGKILL, False), outcome, seen, Path("log"), killed_for_memory=killed)
    assert ended.out_of_memory is answer


V2 = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"


@pytest.mark.parametrize(
    ("groups", "files", "kills"),
    [
        ("0::/pod/a\n", {"pod/a/memory.events": V2}, 2),
        ("0::/pod/a\n", {"memory.events": V2}, 2),
        ("0::/\n", {"memory.events": V2}, 2),
        ("4:memory:/pod/a\n0::/\n", {"memory/pod/a/memory.oom_control": V1}, 5),
        ("4:cpu,memory:/x\n", {"memory/memory.oom_control": V1}, 5),
        ("4:memory:/a\n", {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, None),
        ("4:cpu:/a\n", {"memory/a/memory.oom_control": V1}, None),
        ("0::/\n", {}, None),
        (None, {}, None),
    ],
)
def test_the_counter_of_either_version(
    tmp_path: Path, groups: str | None, files: dict[str, str], kills: int | None
) -> None:
    own = tmp_path / "own"
    if groups is not None:
        own.write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert cgroup.kills(tmp_path / "fs", own) == kills


# --- the verdict ---


def job(training: dict[str, Any], **sections: Any) -> Job:
    return Job.model_validate({**SMALL, "training": training, **sections})


@pytest.mark.parametrize(
    ("training", "sections", "then"),
    [
        ({"per_device_train_batch_size": 8}, {}, 4),
        ({"per_device_train_batch_size": 6, "global_batch_size": 12}, {}, 4),
        ({"per_device_train_batch_size": 1}, {}, "a single row does not fit"),
        ({"per_device_train_batch_size": 8, "loss_type": ["sigmoid", "sft"]}, PAIRS, 4),
        ({"per_device_train_batch_size": 8, "loss_type": "aot"}, PAIRS, "because aot sorts them"),
        ({"per_device_train_batch_size": 8, "loss_type": ["sft", "aot_unpaired"]}, PAIRS, "another loss"),
    ],
)
def test_smaller_batch_table(training: dict[str, Any], sections: dict[str, Any], then: int | str) -> None:
    wanted = job(training, **sections)
    if isinstance(then, int):
        less = smaller_batch(wanted, geometry(wanted), "in step 7", "x")
        assert less.per_device == then
        assert less.per_device * less.accumulation == wanted.training.global_batch_size
        return
    with pytest.raises(RunnerError, match=then) as error:
        smaller_batch(wanted, geometry(wanted), "in step 7", "x")
    assert error.value.exit_code == 1


def test_levers_are_those_that_are_left() -> None:
    everything = job({"gradient_checkpointing": False}, model={**SMALL["model"], "dtype": "float32"})
    assert memory_levers(everything)[0].startswith("a lora section")
    assert "model.dtype: bfloat16" in memory_levers(everything)
    assert "training.gradient_checkpointing: true" in memory_levers(everything)
    small = job({}, lora={"r": 4}, quantization={"load_in_4bit": True})
    assert memory_levers(small)[0].startswith("smaller images")
    assert memory_levers(small)[-1] == "a device with more memory"
    assert "quantization: {load_in_4bit: true}" in memory_levers(job({}, lora={"r": 4}))


def test_a_loss_that_sorts_fixes_the_size(bench: Bench) -> None:
    """What a run with aot began with, it keeps, and it stops where others go on smaller."""
    bench.job["datasets"] = {
        part: [{**bench.job["datasets"]["train"][0], "format": "preference"}] for part in ("train", "eval")
    }
    bench.job["method"] = "dpo"
    del bench.job["evaluation"]
    aot = ("training.loss_type=aot", f"{PER_DEVICE}=4")
    code, output = bench.train(full("step:3", 2), overrides=aot)
    assert code == 1
    assert "4 pairs do not fit the memory" in output
    code, output = bench.train(overrides=("training.loss_type=aot", f"{PER_DEVICE}=2"))
    assert code == 78
    assert f"{PER_DEVICE}: 4 -> 2" in output
