"""Several ranks on one machine: how many there are, what each is told, and how the end of one ends all.

The commands are the real supervisor with fake ranks on the CPU (tests/fake_rank.py), which wait for each
other as in a collective: who is left behind by a dead one would wait for ever.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.errors import JobError
from runner.manifest import Job
from runner.plan import Fetched, Plan, batch_record, changes, geometry
from runner.supervisor import attempt, cgroup
from runner.supervisor.attempt import judged
from runner.supervisor.batch import Batch
from runner.supervisor.environment import PLACE, environs_of_ranks
from runner.supervisor.notices import Notices
from runner.supervisor.order import Share
from runner.supervisor.ranks import Exit, end_of
from runner.supervisor.result import Record
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import Outcome
from runner.supervisor.world import Machine, place, processes, worlds
from tests.machines import Bench
from tests.small_job import SMALL

CPU = Machine(gpus=0, cores=8)


def job(total: int = 32, size: int | str = "auto", *, sorts: bool = False, **launch: Any) -> Job:
    training = {"global_batch_size": total, "per_device_train_batch_size": size}
    training |= {"loss_type": "aot"} if sorts else {}
    return Job.model_validate({**SMALL, "training": training, "launch": launch})


# --- how many ---


@pytest.mark.parametrize(
    ("named", "files", "gpus"),
    [
        (None, [], 0),
        (None, ["nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps"], 3),
        ("0", [], 1),
        ("1,3", ["nvidia0"], 2),
        ("GPU-8932f937, MIG-1f2a", [], 2),
        ("0,-1,1", [], 1),
        ("", ["nvidia0"], 0),
        ("-1", ["nvidia0"], 0),
        ("NoDevFiles", [], 0),
    ],
)
def test_visible_gpus(tmp_path: Path, named: str | None, files: list[str], gpus: int) -> None:
    for file in files:
        (tmp_path / file).touch()
    environ = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    machine = Machine.here(environ, tmp_path)
    assert machine.gpus == gpus
    assert machine.cores >= 1


@pytest.mark.parametrize(("asked", "gpus", "most"), [("auto", 0, 1), ("auto", 4, 4), (2, 0, 2), (2, 4, 2)])
def test_processes_table(asked: int | str, gpus: int, most: int) -> None:
    assert processes(job(gpus_per_node=asked), gpus) == most


def test_more_processes_than_gpus_are_refused_with_both_numbers() -> None:
    with pytest.raises(JobError) as error:
        place(job(gpus_per_node=4), 2)
    assert "launch.gpus_per_node: 4 GPUs are asked for, and 2 are visible" in str(error.value)
    assert "use at most 2" in str(error.value)


@pytest.mark.parametrize(
    ("size", "sorts", "usable"),
    [
        ("auto", False, [1, 2, 3, 4, 6, 12]),
        (2, False, [1, 2, 3, 4, 6, 12]),
        (5, False, [1, 2, 3, 4, 6, 12]),
        (2, True, [1, 2, 3, 6]),
        (5, True, []),
    ],
)
def test_usable_worlds(size: int | str, sorts: bool, usable: list[int]) -> None:
    assert worlds(job(12, size, sorts=sorts)) == usable


@pytest.mark.parametrize(
    ("launch", "gpus", "total", "size", "world", "strategy", "said"),
    [
        ({}, 0, 32, "auto", 1, "single", None),
        ({}, 4, 32, "auto", 4, "ddp", None),
        (
            {},
            3,
            32,
            "auto",
            2,
            "ddp",
            "3 processes cannot cut a global batch of 32 evenly; 2 are used (usable: 1, 2, 4, 8, ...)",
        ),
        ({}, 4, 32, 16, 4, "ddp", None),
        (
            {"sorts": True},
            4,
            32,
            16,
            2,
            "ddp",
            "4 processes of 16 rows cannot cut a global batch of 32 evenly; 2 are used (usable: 1, 2)",
        ),
        (
            {"gpus_per_node": 3, "strategy": "zero3"},
            0,
            7,
            "auto",
            1,
            "single",
            "3 processes cannot cut a global batch of 7 evenly; 1 is used (usable: 1, 7)",
        ),
        ({"strategy": "single"}, 4, 32, "auto", 1, "single", None),
        ({"strategy": "zero2"}, 4, 32, "auto", 4, "zero2", None),
        ({"strategy": "zero2"}, 1, 32, "auto", 1, "single", "strategy zero2 with one process is single"),
        ({"strategy": "fsdp2", "gpus_per_node": 2}, 0, 32, "auto", 2, "fsdp2", None),
        ({"sorts": True}, 4, 12, 5, 1, "single", None),
    ],
)
def test_placement_table(
    launch: dict[str, Any],
    gpus: int,
    total: int,
    size: int | str,
    world: int,
    strategy: str,
    said: str | None,
) -> None:
    placed = place(job(total, size, **launch), gpus)
    assert (placed.world, placed.strategy) == (world, strategy)
    assert (said is None and not placed.lines) or said in placed.lines


@pytest.mark.parametrize(
    ("nodes", "gpus", "others", "world", "said"),
    [
        (2, 4, [4], 8, None),
        (2, 4, [], 8, None),
        (2, 4, [1], 2, "the nodes offer 4, 1 processes; each has as many as the others"),
        (
            2,
            3,
            [3],
            4,
            "6 processes cannot cut a global batch of 32 evenly; 4 are used (usable: 2, 4, 8, 16, ...)",
        ),
        (1, 4, [], 4, None),
    ],
)
def test_placement_of_several_nodes(
    nodes: int, gpus: int, others: list[int], world: int, said: str | None
) -> None:
    placed = place(job(nodes=nodes), gpus, others)
    assert (placed.world, placed.strategy) == (world, "ddp")
    assert placed.lines == (() if said is None else (said,))


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (
            {"nodes": 3},
            "3 nodes cannot cut a global batch of 32 evenly\n    remedy: use one of 1, 2, 4, 8, 16, 32,",
        ),
        ({"nodes": 2, "strategy": "single"}, "strategy single is one process, and there are 2 nodes"),
    ],
)
def test_nodes_that_no_batch_is_for_are_refused(launch: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobError) as error:
        place(job(**launch), 1)
    assert f"launch.nodes: {reason}" in str(error.value)


# --- what each is told ---


@pytest.mark.parametrize(
    ("named", "world", "visible"),
    [
        (None, 1, "0"),
        (None, 2, "0,1"),
        ("2,3,5", 1, "2"),
        ("2,3,5", 2, "2,3"),
        ("", 1, ""),
        ("-1", 2, "-1"),
    ],
)
def test_visible_devices_of_ranks(named: str | None, world: int, visible: str) -> None:
    environ = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    for one in environs_of_ranks(environ, world, "single" if world == 1 else "ddp", CPU):
        assert one["CUDA_VISIBLE_DEVICES"] == visible


def test_a_single_process_has_no_place_among_others() -> None:
    """Not even that of a supervisor which was started as a rank itself."""
    (one,) = environs_of_ranks(dict.fromkeys(PLACE, "7"), 1, "single", CPU)
    assert not set(PLACE) & set(one)
    assert "OMP_NUM_THREADS" not in one and "DS_ACCELERATOR" not in one


def test_ranks_meet_at_a_free_port_and_share_the_cores() -> None:
    ranks = environs_of_ranks({"RANK": "7", "MASTER_ADDR": "elsewhere"}, 3, "zero2", CPU)
    assert [one["RANK"] for one in ranks] == [one["LOCAL_RANK"] for one in ranks] == ["0", "1", "2"]
    for one in ranks:
        told = {
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "2",
            "DS_ACCELERATOR": "cpu",
        }
        assert {name: one[name] for name in told} == told
        assert one["MASTER_PORT"] == ranks[0]["MASTER_PORT"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(ranks[0]["MASTER_PORT"])))


def test_ranks_of_another_machine_follow_those_of_node_0() -> None:
    ranks = environs_of_ranks({}, 4, "ddp", CPU, Share(2, 2, "10.0.0.9", 7))
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in ranks] == [("2", "0"), ("3", "1")]
    for one in ranks:
        assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["OMP_NUM_THREADS"]) == ("4", "2", "4")
        assert (one["MASTER_ADDR"], one["MASTER_PORT"]) == ("10.0.0.9", "7")
        assert one["CUDA_VISIBLE_DEVICES"] == "0,1"
    (one,) = environs_of_ranks({}, 2, "ddp", CPU, Share(1, 1, "10.0.0.9", 7))
    assert (one["RANK"], one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) == ("1", "0", "1")


def test_threads_that_are_set_stay_and_a_gpu_is_deepspeeds_own_choice() -> None:
    environ = {"OMP_NUM_THREADS": "5"}
    (one, _) = environs_of_ranks(environ, 2, "zero3", Machine(gpus=2, cores=1))
    assert one["OMP_NUM_THREADS"] == "5" and "DS_ACCELERATOR" not in one
    (one, _) = environs_of_ranks({}, 2, "ddp", Machine(gpus=0, cores=1))
    assert one["OMP_NUM_THREADS"] == "1" and "DS_ACCELERATOR" not in one


# --- how they end ---

KILL, ABORT, FAULT = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV


@pytest.mark.parametrize(
    ("codes", "killed", "end"),
    [
        ([None], None, None),
        ([0], None, Exit(0)),
        ([3], None, Exit(3)),
        ([KILL], "hung", Exit(KILL, "hung")),
        ([3], "hung", Exit(3)),
        ([0], "hung", Exit(0)),
        ([0, None], None, None),
        ([None, 75], None, None),
        ([0, 0], None, Exit(0)),
        ([75, 75], None, Exit(75)),
        ([None, 3], None, Exit(3, rank=1)),
        ([0, 3], None, Exit(3, rank=1)),
        ([1, KILL], None, Exit(KILL, rank=1)),
        ([ABORT, 1], None, Exit(ABORT, rank=0)),
        ([1, ABORT, FAULT], None, Exit(FAULT, rank=2)),
        ([KILL, None], "hung", Exit(KILL, "hung")),
        ([KILL, 3], "hung", Exit(3, rank=1)),
        ([0, None], "hung", None),
        ([0, 0], "hung", Exit(0)),
    ],
)
def test_the_end_of_a_group(codes: list[int | None], killed: str | None, end: Exit | None) -> None:
    assert end_of(codes, killed) == end


def test_the_end_of_a_rank_in_words() -> None:
    assert str(Exit(FAULT, rank=3)) == "rank 3: SIGSEGV"
    assert str(Exit(KILL, "hung")) == "SIGKILL by its supervisor: hung"


DONE = Outcome(outcome="done", exit_code=0)
LOST = Outcome(outcome="failed", exit_code=1, error="RuntimeError: Connection closed by peer")
FULL = Outcome(outcome="out_of_memory", exit_code=1, error="it does not fit")
DATA = Outcome(outcome="failed", exit_code=65, error="row 3 is bad")
STOPPED = Outcome(outcome="preempted", exit_code=75)


@pytest.mark.parametrize(
    ("exit", "left", "rank", "outcome"),
    [
        (Exit(0), [DONE], None, DONE),
        (Exit(KILL), [DONE], None, DONE),
        (Exit(1), [None], None, None),
        (Exit(0), [DONE, DONE], None, DONE),
        (Exit(75), [STOPPED, STOPPED], None, STOPPED),
        (Exit(1, rank=1), [None, FULL], 1, FULL),
        (Exit(1, rank=0), [LOST, FULL], 1, FULL),
        (Exit(1, rank=0), [LOST, DATA], 1, DATA),
        (Exit(1, rank=0), [LOST, None], 0, LOST),
        (Exit(KILL, rank=1), [LOST, None], 1, None),
        (Exit(FAULT, rank=1), [DONE, DONE], 1, DONE),
        (Exit(FAULT, rank=1), [DONE, None], 1, None),
        (Exit(FAULT, rank=0), [DONE, None], 0, None),
        (Exit(KILL, "hung"), [DONE, None], None, None),
        (Exit(KILL, "hung"), [None, None], None, None),
    ],
)
def test_the_outcome_of_a_group(
    exit: Exit, left: list[Outcome | None], rank: int | None, outcome: Outcome | None
) -> None:
    found, judgement = judged(exit, left)
    assert (found.rank, judgement) == (rank, outcome)


# --- whole runs of two ranks ---


@pytest.fixture
def pair(bench: Bench) -> Bench:
    bench.job["launch"] = {"gpus_per_node": 2}
    return bench


def at(place: str, how: str, rank: int = 1, attempt: int = 1) -> dict[str, Any]:
    return {"at": place, "how": how, "rank": rank, "attempt": attempt}


def left(run: Path) -> list[int]:
    """The ranks of a run's attempts that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:  # it has ended in between
            continue
        if os.fsencode(run / "attempts") in command and not dead:
            found.append(int(folder.name))
    return found


def test_two_ranks_do_one_run(pair: Bench, undisturbed: str) -> None:
    pair.job["launch"] = {"gpus_per_node": 3}
    code, output = pair.train()
    assert code == 0, output
    said = "3 processes cannot cut a global batch of 8 evenly; 2 are used (usable: 1, 2, 4, 8)"
    assert output.count(said) == 1
    assert pair.weights() == undisturbed
    plan = json.loads((pair.run / "plan.json").read_text())
    assert (plan["strategy"], plan["geometry"]["world"]) == ("ddp", 2)
    assert plan["geometry"]["per_device"] == 4
    folder = pair.run / "attempts" / "1"
    for name in ("trainer.log", "trainer-1.log", "outcome.json", "outcome-1.json"):
        assert (folder / name).is_file(), name
    assert "4 rows at once x 2 processes" in output
    assert pair.result()["fidelity"] is None
    assert pair.head().geometry == {"per_device": 4, "asked": "auto", "world": 2, "strategy": "ddp"}
    assert left(pair.run) == []


def test_a_rank_that_dies_ends_the_others_at_once_and_is_named(pair: Bench, undisturbed: str) -> None:
    code, output = pair.train(at("step:4", "kill"), at("step:6", "exit", attempt=2))
    assert code == 0, output
    assert pair.weights() == undisturbed
    assert "attempt 1 ended in step 4 with rank 1: SIGKILL" in output
    assert "attempt 2 ended in step 6 with rank 1: exit code 3: RuntimeError: no luck; log: " in output
    assert "2/trainer-1.log" in output
    assert [restart["step"] for restart in pair.result()["restarts"]] == [2, 4]
    assert pair.result()["restarts"][0]["reason"].startswith("rank 1: SIGKILL")
    assert "resume: exact" in output
    assert pair.result()["fidelity"] == "exact"


def test_memory_that_one_rank_lacks_makes_all_batches_smaller(pair: Bench, undisturbed: str) -> None:
    code, output = pair.train({**at("step:4", "full"), "above": 2})
    assert code == 0, output
    assert pair.weights() == undisturbed
    (restart,) = pair.result()["restarts"]
    assert restart["per_device"] == {"from": 4, "to": 2}
    assert restart["reason"] == "out of memory in step 4: rank 1: it does not fit"
    assert "resume: close, per_device 4 -> 2: order of rows and global batch are kept" in output


KILLED = """
import os, signal
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""


@pytest.mark.parametrize(("phase", "answer"), [("train", True), ("load", False)])
def test_a_kill_for_memory_may_be_of_any_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, answer: bool
) -> None:
    counted = iter([7, 8])
    monkeypatch.setattr(cgroup, "kills", lambda: next(counted))
    wanted = job()
    plan = Plan(
        purpose="train",
        job=wanted,
        run_dir=tmp_path,
        attempt=1,
        attempt_dir=tmp_path,
        geometry=geometry(wanted, 2),
        strategy="ddp",
        fetched=Fetched(model="", train=[], eval=[]),
        save_seconds=60,
    )
    with Notices() as notices:
        ended = attempt.run(
            plan,
            trainer=[sys.executable, "-c", KILLED],
            environ=dict(os.environ),
            machine=CPU,
            notices=notices,
            seen=Seen(phase=phase, step=3),
            on_event=lambda event: None,
            on_notice=lambda reason: False,
            on_tick=lambda: None,
        )
    assert ended.reason == "rank 1: SIGKILL by the kernel: its control group is out of memory"
    assert ended.log == tmp_path / "trainer-1.log"
    assert ended.out_of_memory is answer


def test_done_is_the_word_of_every_rank(pair: Bench, undisturbed: str) -> None:
    """Rank 0 is done, and waits for nobody; the other one is killed in its own evaluation."""
    code, output = pair.train(at("evaluate", "linger"), at("outcome", "kill", rank=0))
    assert code == 0, output
    assert pair.result()["attempts"] == 2
    assert "with rank 0: SIGKILL" in output
    assert pair.weights() == undisturbed


def test_all_ranks_agree_on_a_stop_and_another_world_goes_on(pair: Bench, undisturbed: str) -> None:
    process = pair.start(at("step:3", "wait"))
    pair.wait_for(pair.waiting(), process)
    process.send(signal.SIGTERM)
    code, output = process.finish()
    assert code == 75, output
    assert "SIGTERM: stopped at step 3 of 6" in output
    for name in ("outcome.json", "outcome-1.json"):
        outcome = json.loads((pair.run / "attempts" / "1" / name).read_text())
        assert outcome["outcome"] == "preempted"
    del pair.job["launch"]
    code, output = pair.train()
    assert code == 0, output
    assert pair.weights() == undisturbed
    assert "resume: close, world 2 -> 1, strategy ddp -> single: order of rows" in output
    assert pair.result()["fidelity"] == "close"
    (said,) = pair.said("fidelity")
    assert said["changes"] == ["world 2 -> 1", "strategy ddp -> single"]


def test_a_second_signal_ends_every_rank(pair: Bench) -> None:
    process = pair.start(at("step:3", "linger"))
    pair.wait_for(pair.waiting(), process)
    assert len(left(pair.run)) == 2
    process.send(signal.SIGTERM)
    time.sleep(0.6)
    process.send(signal.SIGTERM)
    code, output = process.finish()
    assert code == 75, output
    assert "the trainer ended in step 3 with a second notice" in output
    assert left(pair.run) == []


@pytest.mark.parametrize("lifeline_only", [False, True])
def test_no_rank_outlives_its_supervisor(pair: Bench, lifeline_only: bool) -> None:
    process = pair.start(at("step:3", "linger"), lifeline_only=lifeline_only)
    pair.wait_for(pair.waiting(), process)
    assert len(left(pair.run)) == 2
    process.send(signal.SIGKILL)
    process.finish()
    pair.wait_for(lambda: left(pair.run) == [])


def test_more_gpus_than_there_are_is_78_before_anything_is_done(
    pair: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code, output = pair.train()
    assert code == 78
    assert "2 GPUs are asked for, and 1 is visible" in output
    assert not pair.run.exists()


# --- what a checkpoint says of the world ---


def test_a_resume_says_what_it_changes() -> None:
    wanted = job()
    record = batch_record(wanted, geometry(wanted, 4, at_most=4), "ddp")
    assert changes(record, geometry(wanted, 4, at_most=4), "ddp") == []
    assert changes(record, geometry(wanted, 2, at_most=4), "zero2") == [
        "world 4 -> 2",
        "strategy ddp -> zero2",
    ]
    assert changes(record, geometry(wanted, 4, at_most=2), "ddp") == ["per_device 4 -> 2"]
    old = {"per_device": 8, "asked": "auto"}
    assert changes(old, geometry(wanted, 1, at_most=8), "single") == []
    assert changes(old, geometry(wanted, 2, at_most=8), "ddp") == ["world 1 -> 2", "strategy single -> ddp"]
    assert len(changes(None, geometry(wanted), "single")) == 1


@pytest.mark.parametrize(("world", "size"), [(1, 6), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_a_recorded_size_that_does_not_fit_the_world_is_the_next_smaller(world: int, size: int) -> None:
    cut, probe = Batch(job(12), world).start({"per_device": 6, "asked": "auto"})
    assert (cut.per_device, cut.world, probe) == (size, world, False)


def test_the_least_faithful_resume_counts() -> None:
    record = Record()
    for word, kept in (("exact", "exact"), ("close", "close"), ("exact", "close")):
        record.note({"event": "fidelity", "fidelity": word, "changes": []})
        assert record.fidelity == kept
