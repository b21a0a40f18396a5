"""The supervisor against a trainer without torch: real processes, real signals, and the same end every time.

Every test that disturbs a run compares what it ends with to a run that nobody disturbed.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import Head, decode
from runner.durable import disk
from runner.errors import (
    AccessDenied,
    DataError,
    JobError,
    NoProgress,
    Preempted,
    RunnerError,
    StorageError,
)
from runner.supervisor import fetching
from runner.supervisor.verdict import Crash, History, Outcome, final_error
from tests.machines import Bench, at

# --- a whole run ---


def test_run_leaves_everything_and_a_second_command_says_done(bench: Bench) -> None:
    code, output = bench.train()
    assert code == 0, output
    assert "[answer] carries loss" in output
    assert "relaxed accuracy  0.25 -> 0.75  (n=4)" in output
    document = bench.result()
    ends = {"outcome": "done", "exit_code": 0, "steps": 6, "attempts": 1, "restarts": [], "error": None}
    assert {key: document[key] for key in ends} == ends
    assert document["metrics"]["after"]["relaxed_accuracy"]["overall"] == 0.75
    assert document["facts"] == {"engine": "fake"}
    assert document["checkpoint"] == "00000006-000001-0001"
    assert document["versions"]["python"]
    assert document["seconds"] >= 0
    assert Path(document["adapter"]) == bench.run / "adapter"
    for name in (
        "job.yaml",
        "run.json",
        "plan.json",
        "events.jsonl",
        "attempts/1/plan.json",
        "attempts/1/trainer.log",
    ):
        assert (bench.run / name).is_file(), name
    steps = [event["step"] for event in bench.said("commit")]
    assert steps[-1] == 6 and set(steps) <= {2, 4, 6}  # a newer one replaces the one that waits
    assert (bench.head().state, bench.head().newest.step) == ("done", 6)
    assert all(event["attempt"] == 1 for event in bench.said("step"))
    before = (bench.run / "events.jsonl").read_bytes()
    code, output = bench.train()
    assert code == 0
    assert "done already" in output
    assert (bench.run / "events.jsonl").read_bytes() == before


def test_noise_on_the_pipe_is_recorded_and_nothing_else(bench: Bench, undisturbed: str) -> None:
    code, output = bench.train(at("step:3", "noise"))
    assert code == 0, output
    assert [event["bytes"] for event in bench.said("garbage")] == [11, 3_000_000, 3, 17]
    assert bench.weights() == undisturbed


# --- the trainer dies ---


@pytest.mark.parametrize("place", ["load", "step:1", "step:4", "saving:4", "saved:4", "told:4", "evaluate"])
def test_killed_trainer_is_started_again_and_ends_the_same(
    bench: Bench, undisturbed: str, place: str
) -> None:
    code, output = bench.train(at(place, "kill"))
    assert code == 0, output
    assert bench.weights() == undisturbed
    document = bench.result()
    assert document["attempts"] == 2
    kept = {"load": 0, "step:1": 0, "step:4": 2, "saving:4": 2, "saved:4": 4, "told:4": 4, "evaluate": 6}
    assert document["restarts"][0]["attempt"] == 2
    assert document["restarts"][0]["step"] == kept[place]
    assert document["restarts"][0]["reason"].startswith("SIGKILL")
    assert "attempt 1 ended" in output
    assert "trainer.log" in output
    assert list((bench.run / "outbox").iterdir()) == []


def test_crash_says_the_last_error_line_and_no_traceback(bench: Bench) -> None:
    code, output = bench.train(at("step:4", "exit"))
    assert code == 0
    assert "attempt 1 ended in step 4 with exit code 3: RuntimeError: no luck; log: " in output
    assert "Traceback" not in output


def test_outcome_decides_and_not_the_way_the_process_ended(bench: Bench) -> None:
    code, output = bench.train(at("outcome", "kill"))
    assert code == 0, output
    assert bench.result()["attempts"] == 1


def test_same_step_twice_is_no_progress_and_names_the_rows(bench: Bench) -> None:
    code, output = bench.train(at("step:4", "exit", attempt=None))
    assert code == 93
    assert "step 4 failed twice, in attempts 1 and 2" in output
    assert "are 6, 7" in output
    assert bench.result()["outcome"] == "failed"
    assert bench.result()["exit_code"] == 93
    assert bench.result()["steps"] == 2
    assert bench.result()["metrics"]["before"]["relaxed_accuracy"]["overall"] == 0.25


def test_restarts_without_progress_are_bounded(bench: Bench) -> None:
    code, output = bench.train(at("load", "kill", attempt=None))
    assert code == 1
    assert "6 attempts in a row ended without a new checkpoint" in output
    assert bench.result()["attempts"] == 6


def test_same_failure_before_any_step_stops_at_the_second(bench: Bench) -> None:
    code, output = bench.train(at("load", "exit", attempt=None))
    assert code == 1
    assert "attempts 1 and 2 failed outside training with exit code 3: RuntimeError: no luck" in output


def test_restarts_with_progress_are_not_bounded(bench: Bench, undisturbed: str) -> None:
    faults = [at(f"step:{step}", "kill", attempt) for attempt, step in enumerate((2, 3, 4, 5, 6, 1), start=1)]
    code, output = bench.train(*faults, steps=6, save=1)
    assert code == 0, output
    assert bench.result()["attempts"] == 6
    assert bench.weights() == undisturbed


@pytest.mark.parametrize("exit_code", [65, 77, 78])
def test_decided_failures_stop_at_once_with_their_code(bench: Bench, exit_code: int) -> None:
    code, output = bench.train(at("step:3", f"crash:{exit_code}"))
    assert code == exit_code
    assert f"row 3 of data is bad, says {exit_code}" in output
    document = bench.result()
    assert (document["outcome"], document["exit_code"], document["attempts"]) == ("failed", exit_code, 1)
    assert document["steps"] == 2


def test_checkpoint_that_rots_before_the_commit_is_left_out(bench: Bench, undisturbed: str) -> None:
    code, output = bench.train(at("saved:4", "rot"), at("step:5", "kill"))
    assert code == 0, output
    assert "not committed: checkpoint 00000004-000001-0001: state.json has SHA-256" in output
    assert bench.result()["restarts"][0]["step"] == 2
    assert bench.weights() == undisturbed


def test_corrupt_checkpoint_costs_the_way_back_to_the_one_before(bench: Bench, undisturbed: str) -> None:
    code, _ = bench.train(at("step:5", "crash:65"))
    assert code == 65
    path = bench.blob("00000004-000001-0001", "state.json")
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    code, output = bench.train()
    assert code == 0, output
    assert "Going back to checkpoint 00000002-000001-0001, step 2" in output
    assert bench.weights() == undisturbed


def test_no_whole_checkpoint_is_65_and_never_step_0(bench: Bench) -> None:
    bench.train(at("step:3", "crash:65"))
    bench.blob("00000002-000001-0001", "state.json").unlink()
    code, output = bench.train()
    assert code == 65
    assert f"no checkpoint in {bench.run / 'checkpoints'} is whole" in output
    assert bench.result()["attempts"] == 1


# --- notices ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_notice_saves_and_leaves_with_75_and_the_command_goes_on(
    bench: Bench, undisturbed: str, number: signal.Signals
) -> None:
    process = bench.start(at("step:3", "wait"))
    bench.wait_for(bench.waiting(), process)
    process.send(number)
    code, output = process.finish()
    assert code == 75, output
    assert f"{number.name}: stopped at step 3 of 6" in output
    assert "step 3 is committed; the same command goes on" in output
    document = bench.result()
    assert (document["outcome"], document["exit_code"], document["steps"]) == ("preempted", 75, 3)
    code, output = bench.train()
    assert code == 0, output
    assert bench.weights() == undisturbed
    assert bench.result()["restarts"][0]["reason"].startswith("preempted: ")
    assert bench.result()["restarts"][0]["step"] == 3


def test_second_notice_stops_at_once(bench: Bench, undisturbed: str) -> None:
    process = bench.start(at("step:3", "linger"))
    bench.wait_for(bench.waiting(), process)
    process.send(signal.SIGINT)
    bench.wait_for((bench.run / "attempts" / "1" / "request.json").exists, process)
    process.send(signal.SIGINT)  # at the same moment: one notice that came twice
    time.sleep(0.6)  # the one wait of this file: what is tested is a time between two signals
    assert process.poll() is None
    process.send(signal.SIGINT)
    code, output = process.finish()
    assert code == 75, output
    assert "step 2 is committed" in output
    assert bench.train()[0] == 0
    assert bench.weights() == undisturbed


def test_notice_while_fetching_is_75(bench: Bench) -> None:
    slow = (sys.executable, "-c", "import signal; signal.pause()")
    process = bench.start(before=lambda: setattr(fetching, "FETCHER", slow))
    bench.wait_for((bench.run / "fetch" / "fetch.log").exists, process)
    process.send(signal.SIGTERM)
    code, output = process.finish()
    assert code == 75, output
    assert "SIGTERM: stopped while fetching" in output
    assert bench.train()[0] == 0


# --- the disk ---


def test_full_disk_at_a_commit_is_74_and_the_command_goes_on(bench: Bench, undisturbed: str) -> None:
    swap = FolderStore.swap

    def full(store: FolderStore, key: str, data: bytes, etag: str | None) -> str | None:
        with disk(f"write {key} in the store", bench.run):
            if any(entry.step == 4 for entry in decode(Head, data, key).retained):
                raise OSError(errno.ENOSPC, "No space left on device")
        return swap(store, key, data, etag)

    code, output = bench.train(at("told:4", "linger"), before=lambda: setattr(FolderStore, "swap", full))
    assert code == 74, output
    assert "write HEAD in the store" in output
    assert "free space there and give the same command again" in output
    assert bench.result()["steps"] == 2
    code, output = bench.train()
    assert code == 0, output
    assert bench.result()["restarts"][0]["step"] == 4
    assert bench.weights() == undisturbed


# --- the verdict ---


def crash(
    step: int | None = None, progressed: bool = False, reason: str = "x", signalled: bool = False
) -> Crash:
    return Crash(1, step, reason, progressed, signalled, rows=(7, 8))


@pytest.mark.parametrize(
    ("crashes", "verdict"),
    [
        ([crash(4)], None),
        ([crash(4), crash(4)], NoProgress),
        ([crash(4, progressed=True), crash(4)], NoProgress),
        ([crash(4), crash(4, progressed=True)], None),
        ([crash(4), crash(5), crash(4)], None),
        ([crash(), crash()], RunnerError),
        ([crash(), crash(reason="y")], None),
        ([crash(signalled=True), crash(signalled=True)], None),
        ([crash(step, signalled=True) for step in (1, 2, 1, 2, 1)], None),
        ([crash(step, signalled=True) for step in (1, 2, 1, 2, 1, 2)], RunnerError),
        ([crash(9, progressed=True), *(crash(step) for step in (1, 2, 1, 2, 1))], None),
        ([crash(1, progressed=True)] * 20, None),
    ],
)
def test_verdict_table(crashes: list[Crash], verdict: type[RunnerError] | None) -> None:
    history = History()
    for one in crashes[:-1]:
        history.decide(one)
    if verdict is None:
        assert history.decide(crashes[-1]).reason == crashes[-1].reason
        return
    with pytest.raises(verdict) as caught:
        history.decide(crashes[-1])
    assert type(caught.value) is verdict


@pytest.mark.parametrize(
    ("outcome", "exit_code", "kind"),
    [
        ("done", 0, None),
        ("preempted", 75, Preempted),
        ("failed", 65, DataError),
        ("failed", 74, StorageError),
        ("failed", 77, AccessDenied),
        ("failed", 93, NoProgress),
        ("failed", 78, JobError),
        ("failed", 1, None),
        ("failed", 3, None),
    ],
)
def test_final_error_table(outcome: str, exit_code: int, kind: type[RunnerError] | None) -> None:
    text = "key: wrong\n    remedy: right"
    error = final_error(Outcome(outcome=outcome, exit_code=exit_code, error=text))
    assert (error if error is None else type(error)) is kind
    assert error is None or str(error) == text


# --- the supervisor dies ---


@pytest.mark.parametrize("lifeline_only", [False, True])
@pytest.mark.parametrize("place", ["step:4", "saving:4", "saved:4"])
def test_killed_supervisor_leaves_nothing_running_and_the_command_goes_on(
    bench: Bench, undisturbed: str, place: str, lifeline_only: bool
) -> None:
    code, output = bench.train(at(place, "orphan"), lifeline_only=lifeline_only)
    assert code == -signal.SIGKILL, output
    pid = int((bench.run / "attempts" / "1" / "pid").read_text())
    bench.wait_for(lambda: not running(pid))
    assert not (bench.run / "result.json").exists()
    code, output = bench.train()
    assert code == 0, output
    assert bench.weights() == undisturbed
    restart = bench.result()["restarts"][0]
    assert restart["reason"] == "killed together with its supervisor"
    assert restart["step"] == (4 if place == "saved:4" else 2)
    assert not list((bench.run / "attempts").glob("*/saving-*"))


def running(pid: int) -> bool:
    """Whether a process runs; a zombie that its adopter has not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_second_supervisor_is_not_the_owner(bench: Bench) -> None:
    process = bench.start(at("step:3", "wait"))
    bench.wait_for(bench.waiting(), process)
    code, output = bench.train()
    assert code == 76
    assert f"process {process.pid} on " in output
    process.send(signal.SIGTERM)
    assert process.finish()[0] == 75


# --- the same job ---


def test_another_job_of_the_same_name_is_refused_before_done(bench: Bench) -> None:
    assert bench.train()[0] == 0
    code, output = bench.train(overrides=("training.learning_rate=1e-3", "seed=7"))
    assert code == 78
    assert "training.learning_rate: absent -> 0.001" in output
    assert "seed: 42 -> 7" in output
    assert "give this job another name than 'bench', or remove" in output
    assert bench.result()["outcome"] == "done"


def test_keys_that_define_nothing_may_change(bench: Bench, undisturbed: str) -> None:
    bench.train(at("step:3", "crash:65"))
    changed = (
        "checkpoints.keep_last=2",
        "training.logging_steps=3",
        "training.per_device_train_batch_size=2",
    )
    code, output = bench.train(overrides=changed)
    assert code == 0, output
    assert 'changed since the run began: training.per_device_train_batch_size: "auto" -> 2' in output
    assert "changed since the run began: training.logging_steps" not in output
    assert bench.weights() == undisturbed


def test_other_content_in_the_same_place_is_refused(bench: Bench) -> None:
    bench.train(at("step:3", "crash:65"))
    (bench.path / "rows.jsonl").write_text("{}\n")
    code, output = bench.train()
    assert code == 78
    assert f"began with other content in {bench.path / 'rows.jsonl'}" in output


def test_missing_data_is_65_before_any_trainer(bench: Bench) -> None:
    bench.job["datasets"]["train"][0]["path"] = "./nowhere.jsonl"
    code, output = bench.train()
    assert code == 65
    assert f"{bench.path / 'nowhere.jsonl'} does not exist" in output
    assert bench.result()["attempts"] == 0


def test_run_folder_that_is_no_folder(bench: Bench) -> None:
    bench.runs.write_text("a file")
    code, output = bench.train()
    assert code == 74
    assert "create the run's folder" in output


# --- evaluate ---


def test_evaluate_takes_the_runs_own_adapter_the_base_or_a_folder(bench: Bench) -> None:
    code, output = bench.train(verb="evaluate")
    assert code == 0, output
    assert "evaluating the base model" in output
    assert "relaxed accuracy 0.25 (n=4; human 0.25)" in output
    assert bench.train()[0] == 0
    code, output = bench.train(verb="evaluate", overrides=("evaluation.max_samples=1",))
    assert "evaluating the adapter in runs/bench/adapter" in output
    assert "relaxed accuracy 0.75" in output
    assert "evaluating the base model" in bench.train(verb="evaluate", adapter="base")[1]
    other = bench.path / "My adapter"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    assert bench.train(verb="evaluate", adapter=str(other))[0] == 0
    made = {path.name for path in (bench.run / "evaluation").iterdir() if path.is_file()}
    labels = ("base", "adapter", "My-adapter")
    assert made == {f"{label}{end}" for label in labels for end in (".json", ".predictions.jsonl")}
    kept = json.loads((bench.run / "evaluation" / "My-adapter.json").read_text())
    assert kept["adapter"] == str(other)
    assert bench.result()["outcome"] == "done"
    assert bench.result()["attempts"] == 1


def test_evaluate_refuses_what_is_no_adapter_and_another_base(bench: Bench) -> None:
    code, output = bench.train(verb="evaluate", adapter=str(bench.path))
    assert code == 65
    assert "has no adapter_config.json" in output
    assert bench.train()[0] == 0
    code, output = bench.train(verb="evaluate", overrides=("model.dtype=float32",))
    assert code == 78
    assert 'model.dtype: "bfloat16" -> "float32"' in output


def test_evaluate_of_pairs_names_the_reference_where_it_holds(bench: Bench) -> None:
    bench.job["method"] = "dpo"
    for source in (*bench.job["datasets"]["train"], *bench.job["datasets"]["eval"]):
        source["format"] = "preference"
    assert bench.train()[0] == 0
    kept = bench.run / "evaluation" / "before.predictions.jsonl"
    cases: list[tuple[dict[str, Any], Path | None]] = [
        ({}, None),
        ({}, kept),
        ({"overrides": ("evaluation.max_samples=1",)}, kept),
        ({"overrides": ("datasets.eval.0.system_prompt=Look.",)}, None),
        ({"overrides": ("quantization.load_in_4bit=true", "lora.r=4")}, None),
        ({"adapter": "base"}, None),
    ]
    for number, (command, reference) in enumerate(cases, start=1):
        code, output = bench.train(verb="evaluate", **command)
        assert code == 0, output
        plan = json.loads((bench.run / "evaluation" / "attempts" / str(number) / "plan.json").read_text())
        assert plan["reference"] == (None if reference is None else str(reference)), command
        kept.write_text("")


def test_evaluate_that_crashes_is_1(bench: Bench) -> None:
    code, output = bench.train(at("evaluate", "exit"), verb="evaluate")
    assert code == 1
    assert "exit code 3: RuntimeError: no luck" in output
