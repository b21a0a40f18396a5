"""Running out of memory as the supervisor sees it: a smaller micro-batch, one restart, the same run.

The trainer is tests/fake_rank.py, whose end says whether a step was lost or done twice. Where this machine
lets a control group be made, the kernel itself does the killing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RunnerError
from runner.manifest import Job
from runner.plan import Fetched, Plan, geometry
from runner.supervisor import attempt, cgroup, ranks
from runner.supervisor.attempt import Ended
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import Exit
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import Outcome, memory_levers, smaller_batch
from runner.supervisor.world import Machine
from tests.machines import RANK, SCRIPT, Bench, at
from tests.small_job import SMALL

PER_DEVICE = "training.per_device_train_batch_size"
PAIRS = {"datasets": {"train": [{"path": "demo:charts", "format": "preference"}]}, "method": "dpo"}


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
group, job, runs, trainer, near = sys.argv[1:]
Path(group, "cgroup.procs").write_text(str(os.getpid()))
ballast = b"x" * (192 << 20)
from runner import launch
from runner.settings import resolve
from runner.supervisor import attempt
attempt.NEAR = float(near)
sys.exit(launch.train(resolve(job, [], {}), Path(runs), trainer=json.loads(trainer)))
"""
"""A process of its own, and the larger one when memory ends: it is the trainer that the kernel shall kill."""


SWELLING = """
import signal, time
from runner.supervisor import cgroup
from tests import fake_faults, fake_rank

def swell(faults, planned, place):
    eaten = []
    while cgroup.pressure() < 0.965:
        eaten.append(b"x" * (1 << 20))
        time.sleep(0.001)
    (faults._folder / "waiting").touch()
    signal.pause()

fake_faults.Faults._break_down = swell
fake_rank.main()
"""
"""The trainer of tests/fake_rank.py, whose faults fill the memory to just above NEAR and stay there."""


def confined(bench: Bench, trainer: list[str], near: float, *faults: dict[str, Any]) -> tuple[int, str, int]:
    """A run in a group of 320 MiB: exit code, output, and the kernel's kills there."""
    job = bench.path / "job.yaml"
    job.write_text(json.dumps(bench.job))
    with control_group(320 << 20) as group:
        command = json.dumps([sys.executable, *trainer, json.dumps({**SCRIPT, "faults": faults})])
        done = subprocess.run(
            [sys.executable, "-c", SUPERVISOR, str(group), str(job), str(bench.runs), command, str(near)],
            env={**os.environ, "PYTHONPATH": str(RANK.parents[1])},
            cwd=bench.path,
            capture_output=True,
            text=True,
        )
        control = (group / "memory.oom_control").read_text().split()
    return done.returncode, done.stdout + done.stderr, int(control[control.index("oom_kill") + 1])


@pytest.mark.parametrize("place", ["probe", "step:4"])
def test_a_kill_by_the_control_group_is_out_of_memory(bench: Bench, undisturbed: str, place: str) -> None:
    fault = {**at(place, "eat", attempt=None), "above": 2}
    code, output, kills = confined(bench, [str(RANK)], float("inf"), fault)
    assert code == 0, output
    assert kills == 2
    assert bench.weights() == undisturbed
    probed = place == "probe"
    assert sizes(bench) == [(8, True), (4, probed), (2, probed)]
    first = bench.result()["restarts"][0]
    assert first["per_device"] == {"from": 8, "to": 4}
    where = "in phase probe" if probed else "in step 4"
    assert (
        first["reason"] == f"out of memory {where}: SIGKILL by the kernel: its control group is out of memory"
    )


@pytest.mark.parametrize("place", ["probe", "step:4", "saving:4"])
def test_a_trainer_near_the_limit_is_ended_before_the_kernel_does(
    bench: Bench, undisturbed: str, place: str
) -> None:
    fault = {**at(place, "swell", attempt=None), "above": 4}
    code, output, kills = confined(bench, ["-c", SWELLING], attempt.NEAR, fault)
    assert code == 0, output
    assert kills == 0
    assert bench.weights() == undisturbed
    assert sizes(bench) == [(8, True), (4, place == "probe")]
    (restart,) = bench.result()["restarts"]
    assert restart["per_device"] == {"from": 8, "to": 4}
    assert re.fullmatch(r"out of memory in .*: at 9[5-9] % of the memory limit", restart["reason"])


def test_a_kill_by_somebody_is_a_crash(bench: Bench, undisturbed: str) -> None:
    assert bench.train(at("step:4", "kill"))[0] == 0
    assert bench.weights() == undisturbed
    assert bench.result()["restarts"][0]["per_device"] is None
    assert sizes(bench) == [(8, True), (8, False)]


@pytest.mark.parametrize(
    ("said", "ended", "killed", "phase", "answer"),
    [
        ("out_of_memory", False, False, "train", True),
        ("failed", False, False, "train", False),
        ("failed", False, True, "train", False),
        ("failed", True, False, "train", False),
        (None, True, False, "train", True),
        (None, True, False, "export", True),
        (None, False, True, "probe", True),
        (None, False, True, "train", True),
        (None, False, True, "save", True),
        (None, False, True, "evaluate_before", False),
        (None, False, True, "load", False),
        (None, False, True, "wait", False),
        (None, False, False, "train", False),
    ],
)
def test_out_of_memory_table(said: str | None, ended: bool, killed: bool, phase: str, answer: bool) -> None:
    outcome = None if said is None else Outcome(outcome=said, exit_code=1)
    seen = Seen(phase=phase, step=3)
    one = Ended(
        Exit(-signal.SIGKILL), outcome, seen, Path("log"), killed_for_memory=killed, ended_for_memory=ended
    )
    assert one.out_of_memory is answer


def planned(folder: Path, training: dict[str, Any], **sections: Any) -> Plan:
    wanted = job(training, **sections)
    return Plan(
        purpose="train",
        job=wanted,
        run_dir=folder,
        attempt=1,
        attempt_dir=folder,
        geometry=geometry(wanted),
        fetched=Fetched(model="", train=[], eval=[]),
        save_seconds=60,
    )


@pytest.mark.parametrize(
    ("share", "phase", "per_device", "loss", "answer"),
    [
        (0.95, "train", 8, "sft", True),
        (1.0, "save", 2, "sft", True),
        (0.97, "probe", None, "sft", True),
        (0.9499, "train", 8, "sft", False),
        (0.97, "train", 1, "sft", False),
        (0.97, "train", 8, "aot", False),
        *((0.97, phase, 8, "sft", False) for phase in ("start", "load", "evaluate", "export", "wait")),
    ],
)
def test_too_full_table(
    tmp_path: Path, share: float, phase: str, per_device: int | None, loss: str, answer: bool
) -> None:
    training = {"per_device_train_batch_size": 8}
    plan = planned(tmp_path, training)
    if loss == "aot":
        plan = planned(tmp_path, {**training, "loss_type": loss}, **PAIRS)
    seen = Seen(phase=phase, step=3, per_device=per_device)
    assert attempt.too_full(share, seen, plan) is answer


@pytest.mark.parametrize(
    ("shares", "peak"), [([None] * 3, None), ([0.5, 0.7, 0.2], 0.7), ([None, 0.99, 0.1], 0.99)]
)
def test_the_peak_is_kept_and_in_no_batch_it_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[float | None], peak: float | None
) -> None:
    left = list(shares)
    monkeypatch.setattr(ranks, "TICK", 0.01)
    monkeypatch.setattr(cgroup, "pressure", lambda: left.pop(0))
    seen = Seen()
    with Notices() as notices:
        ended = attempt.run(
            planned(tmp_path, {}),
            trainer=[sys.executable, "-c", "import signal; signal.pause()"],
            environ=dict(os.environ),
            machine=Machine(gpus=0, cores=2),
            notices=notices,
            seen=seen,
            on_event=lambda event: None,
            on_notice=lambda reason: None,
            on_tick=lambda: None if left else "enough",
        )
    assert ended.reason == "enough"
    assert seen.memory_peak == peak
    assert not ended.out_of_memory


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


MIB = 1 << 20
ABSURD = "9223372036854771712"


def v2(limit: str, used: int, **stat: int) -> dict[str, str]:
    """A group's files; sizes in MiB."""
    lines = {"anon": used, "inactive_anon": used, "slab": 9, **stat}
    return {
        "memory.max": limit + "\n",
        "memory.current": f"{used * MIB}\n",
        "memory.stat": "".join(f"{name} {size * MIB}\n" for name, size in lines.items()),
    }


def v1(limit: str, used: int, **stat: int) -> dict[str, str]:
    names = {"inactive_file": used, "active_file": used, "hierarchical_memory_limit": 1, **stat}
    return {
        "memory.limit_in_bytes": limit + "\n",
        "memory.usage_in_bytes": f"{used * MIB}\n",
        "memory.stat": "".join(f"{name} {size * MIB}\n" for name, size in names.items()),
    }


LIMIT = str(1000 * MIB)


@pytest.mark.parametrize(
    ("groups", "folders", "share"),
    [
        ("0::/pod/a\n", {"pod/a": v2(LIMIT, 970)}, 0.97),
        ("0::/pod/a\n", {"pod/a": v2(LIMIT, 970, inactive_file=20, active_file=30)}, 0.92),
        ("0::/pod/a\n", {"pod/a": v2(LIMIT, 970, slab_reclaimable=70, unevictable=50)}, 0.90),
        # Of group and pod the fuller one, whichever it is.
        ("0::/pod/a\n", {"pod/a": v2(LIMIT, 500), "pod": v2(str(2000 * MIB), 1800)}, 0.90),
        ("0::/pod/a\n", {"pod/a": v2(LIMIT, 950), "pod": v2(str(2000 * MIB), 1800)}, 0.95),
        ("0::/pod/a\n", {"pod/a": v2("max", 500), "pod": v2(LIMIT, 600)}, 0.60),
        ("0::/pod/a\n", {"pod/a": v2("max", 500), "pod": v2("max", 600)}, None),
        # A container whose group's outer path is not visible.
        ("0::/pod/a\n", {"": v2(LIMIT, 970)}, 0.97),
        ("0::/\n", {"": v2(LIMIT, 970)}, 0.97),
        ("0::/../b\n", {"": v2(LIMIT, 970)}, 0.97),
        # The machine's root has no such files.
        ("0::/\n", {}, None),
        ("4:memory:/pod/a\n0::/\n", {"memory/pod/a": v1(LIMIT, 970)}, 0.97),
        (
            "4:cpu,memory:/a\n",
            {"memory/a": v1(LIMIT, 970, total_inactive_file=40, total_active_file=30)},
            0.9,
        ),
        ("4:memory:/pod/a\n", {"memory/pod/a": v1(ABSURD, 970), "memory": v1(LIMIT, 600)}, 0.60),
        ("4:memory:/pod/a\n", {"memory/pod/a": v1(ABSURD, 970)}, None),
        ("4:memory:/a\n", {"memory/a": v1(LIMIT, 500), "a": v2(LIMIT, 900)}, 0.50),
        ("4:cpu:/a\n", {"memory/a": v1(LIMIT, 970)}, None),
        # What the three files say is not of one moment.
        ("0::/a\n", {"a": v2(LIMIT, 10, inactive_file=20)}, 0.0),
        ("0::/a\n", {"a": v2("0", 10)}, None),
        ("0::/a\n", {"a": {"memory.max": LIMIT}}, None),
        ("0::/a\n", {"a": {"memory.max": LIMIT, "memory.current": str(970 * MIB)}}, 0.97),
        ("0::/a\n", {"a": {"memory.max": "", "memory.current": "?"}}, None),
        (None, {}, None),
    ],
)
def test_the_share_of_the_limit_in_use(
    tmp_path: Path, groups: str | None, folders: dict[str, dict[str, str]], share: float | None
) -> None:
    own = tmp_path / "own"
    if groups is not None:
        own.write_text(groups)
    (tmp_path / "fs").mkdir()
    for folder, files in folders.items():
        (tmp_path / "fs" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "fs" / folder / name).write_text(text)
    assert cgroup.pressure(tmp_path / "fs", own) == (None if share is None else pytest.approx(share))


def test_the_share_in_a_real_group() -> None:
    """A process of it sees its own memory, and not the file that the kernel keeps for it."""
    with control_group(320 << 20) as group:
        script = """
import os, sys
from pathlib import Path
from runner.supervisor import cgroup
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = cgroup.pressure()
with open(sys.argv[2], "wb") as file:
    for _ in range(100):
        file.write(b"x" * (1 << 20))
    file.flush()
    os.fsync(file.fileno())
cached = cgroup.pressure()
ballast = b"x" * (160 << 20)
used = int(Path(sys.argv[1], "memory.usage_in_bytes").read_text())
print(before, cached, cgroup.pressure(), used / (320 << 20))
"""
        file = Path(tempfile.gettempdir(), f"runner-test-{os.getpid()}")
        try:
            done = subprocess.run(
                [sys.executable, "-c", script, str(group), str(file)],
                env={**os.environ, "PYTHONPATH": str(RANK.parents[1])},
                capture_output=True,
                text=True,
            )
        finally:
            file.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    before, cached, full, used = map(float, done.stdout.split())
    assert cached - before < 0.1
    assert full - cached == pytest.approx(0.5, abs=0.05)
    assert used > 0.75


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
