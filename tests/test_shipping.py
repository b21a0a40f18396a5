"""Runs whose checkpoints go to a bucket: other machines, second owners, silent stores, notices, the end.

The supervisor is real, the server is real behind a proxy that plays the faults, the trainer is without torch.
A machine is a folder of its own: what one knows, another has from the bucket alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from runner.supervisor.environment import environ_of_trainer
from runner.supervisor.world import Machine
from tests.machines import World, at, hasty
from tests.s3_server import ENVIRONMENT

# --- from machine to machine ---


def test_another_machine_goes_on_and_a_third_has_the_end(world: World, undisturbed: str) -> None:
    first = world.first
    process = first.start(at("step:3", "wait"))
    first.wait_for(first.waiting(), process)
    process.send(signal.SIGTERM)
    code, output = process.finish()
    assert code == 75, output
    assert "step 3 is committed" in output
    assert (world.head().state, world.head().newest.step) == ("released", 3)
    second = world.machine()
    code, output = second.train()
    assert code == 0, output
    assert second.weights() == undisturbed
    document = second.result()
    assert (document["attempts"], document["steps"]) == (2, 6)
    assert [one["reason"].partition(":")[0] for one in document["restarts"]] == ["preempted"]
    assert document["metrics"]["before"]["relaxed_accuracy"]["overall"] == 0.25
    assert (world.head().state, world.head().epoch) == ("done", 2)
    third = world.machine()
    code, output = third.train()
    assert code == 0, output
    assert re.search(r"run bench is done already: \S*runs/bench/adapter", output)
    assert "0.25 -> 0.75" in output
    assert third.weights() == undisturbed
    assert third.result()["attempts"] == 2
    assert not (third.run / "attempts").exists()
    # The first machine has a result of its own, of how it stopped.
    assert first.result()["outcome"] == "preempted"
    code, output = first.train()
    assert code == 0, output
    assert re.search(r"run bench is done already: \S*runs/bench/adapter", output)
    assert first.result() == second.result()
    assert first.weights() == undisturbed


def test_done_is_said_without_a_write(world: World) -> None:
    assert world.first.train()[0] == 0
    world.proxy.clear()
    assert world.first.train()[0] == 0
    assert {method for method, _ in world.proxy.requests} == {"GET"}
    assert len(world.proxy.requests) <= 4


def test_killed_machine_is_followed_after_its_ttl_and_its_zombie_is_fenced(
    world: World, undisturbed: str
) -> None:
    first, second = world.first, world.machine()
    zombie = first.start(at("step:5", "wait"), before=hasty)
    first.wait_for(first.waiting(), zombie)
    first.wait_for(lambda: world.head().newest is not None and world.head().newest.step == 4)
    os.kill(zombie.pid, signal.SIGSTOP)
    code, output = second.train(before=hasty)
    assert code == 0, output
    assert "waiting for it" in output
    assert second.weights() == undisturbed
    assert second.result()["restarts"][0]["reason"] == "killed together with its supervisor"
    head = world.object("HEAD")
    os.kill(zombie.pid, signal.SIGCONT)
    code, output = zombie.finish()
    assert code == 76, output
    assert "epoch 2 belongs to" in output
    assert world.object("HEAD") == head


def test_living_owner_is_left_alone(world: World) -> None:
    first, second = world.first, world.machine()
    process = first.start(at("step:3", "wait"), before=hasty)
    first.wait_for(first.waiting(), process)
    began = time.monotonic()
    code, output = second.train(before=hasty)
    assert code == 76, output
    assert time.monotonic() - began < 10
    assert "epoch 1 belongs to" in output
    assert not (second.run / "result.json").exists()
    os.environ["RUNNER_JOB_UID"] = "sibling"
    process.send(signal.SIGTERM)
    assert process.finish()[0] == 75


def test_sibling_of_the_same_orchestrator_job_leaves_with_75(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_JOB_UID", "job-1")
    process = world.first.start(at("step:3", "wait"), before=hasty)
    world.first.wait_for(world.first.waiting(), process)
    code, output = world.machine().train(before=hasty)
    assert code == 75, output
    assert "of the same job job-1" in output
    process.send(signal.SIGTERM)
    assert process.finish()[0] == 75


def test_notice_ends_the_wait_for_another_owner(world: World) -> None:
    process = world.first.start(at("step:3", "wait"))
    world.first.wait_for(world.first.waiting(), process)
    second = world.machine()
    waiting = second.start()
    second.wait_for(lambda: "waiting for it" in waiting.output(), waiting)
    waiting.send(signal.SIGTERM)
    code, output = waiting.finish()
    assert code == 75, output
    process.send(signal.SIGTERM)
    assert process.finish()[0] == 75


def test_sources_are_fetched_while_the_former_owner_may_live(world: World, undisturbed: str) -> None:
    first, second = world.first, world.machine()
    process = first.start(at("step:5", "wait"), before=hasty)
    first.wait_for(first.waiting(), process)
    os.kill(process.pid, signal.SIGSTOP)
    code, output = second.train(before=hasty)
    assert code == 0, output
    epoch = next(event for event in second.events() if event["event"] == "owner")
    fetch = next(event for event in second.events() if event.get("phase") == "fetch")
    assert fetch["time"] < epoch["time"]
    assert second.weights() == undisturbed
    os.kill(process.pid, signal.SIGKILL)


# --- the store is not there ---


def test_training_waits_for_a_store_that_is_further_behind_than_max_loss(
    world: World, undisturbed: str
) -> None:
    first = world.first
    first.job["checkpoints"] |= {"max_loss": "1s"}
    process = first.start(at("step:2", "hold"), step_seconds=0.2, save=1, before=hasty)
    first.wait_for(first.waiting(), process)
    world.proxy.fail("PUT", "", "503", times=10_000)
    (first.run / "attempts" / "1" / "go").touch()
    first.wait_for(lambda: bool(first.said("wait")), process)
    time.sleep(1.0)  # what is tested is that nothing happens
    step = first.said("step")[-1]["step"]
    assert step < 6
    world.proxy.clear()
    code, output = process.finish()
    assert code == 0, output
    assert "training waits for the store" in output and "training goes on" in output
    assert first.said("go")
    assert "503" in first.said("store")[0]["message"]
    assert first.weights() == undisturbed


def test_training_does_not_wait_for_a_checkpoint_that_was_damaged(world: World, undisturbed: str) -> None:
    """The save that a wait asks for rots before it is sent: nothing would ever end the wait."""
    first = world.first
    first.job["checkpoints"] |= {"max_loss": "1s"}
    process = first.start(at("step:3", "hold"), at("saved:3", "rot"), before=hasty)
    first.wait_for(first.waiting(), process)
    first.wait_for(lambda: bool(first.said("wait")), process)
    (first.run / "attempts" / "1" / "go").touch()
    code, output = process.finish()
    assert code == 0, output
    assert "not committed: checkpoint 00000003" in output
    assert "was damaged before it was sent" in first.result()["restarts"][0]["reason"]
    assert first.weights() == undisturbed


def test_killed_between_its_last_words_and_done_it_is_not_done(world: World, undisturbed: str) -> None:
    def deadly() -> None:
        from runner.checkpoint.commit import Committer

        Committer.finish = lambda committer, sealed: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore

    code, _ = world.first.train(before=deadly)
    assert code == -signal.SIGKILL
    assert not (world.first.run / "result.json").exists()
    code, output = world.first.train()
    assert code == 0, output
    assert world.first.result()["attempts"] == 2
    assert world.first.weights() == undisturbed


def test_store_that_stays_away_is_74_and_what_was_saved_here_is_not_lost(
    world: World, undisturbed: str
) -> None:
    first = world.first
    first.job["checkpoints"] |= {"store_patience": "1s"}
    process = first.start(at("step:3", "hold"), before=hasty)
    first.wait_for(first.waiting(), process)
    world.proxy.fail("PUT", "", "503", times=10_000)
    (first.run / "attempts" / "1" / "go").touch()
    code, output = process.finish()
    assert code == 74, output
    assert "SlowDown" in output
    world.proxy.clear()
    kept = [path.name for path in (first.run / "outbox").iterdir()]
    assert kept
    code, output = first.train()
    assert code == 0, output
    assert [event["leftover"] for event in first.said("commit")][-2:-1] == [True] or first.said("removed")
    assert first.weights() == undisturbed


# --- what the store says about the run ---


def test_events_lie_in_the_store(world: World) -> None:
    assert world.first.train()[0] == 0
    newest = world.head().events
    assert newest is not None
    lines = [json.loads(line) for line in (world.object(newest) or b"").splitlines()]
    assert lines[-1]["event"] == "end" and lines[-1]["outcome"] == "done"


def test_run_whose_store_was_emptied_is_not_begun_again(world: World) -> None:
    world.first.train(at("step:3", "crash:65"))
    world.first.job["checkpoints"] = {"uri": f"{world.uri}-other"}
    code, output = world.first.train()
    assert code == 65
    assert f"which began with checkpoints in {world.uri}/bench" in output
    assert not world.first.said("attempt")[1:]


def test_another_job_of_this_name_is_refused_on_any_machine(world: World) -> None:
    assert world.first.train()[0] == 0
    second = world.machine()
    code, output = second.train(overrides=("seed=7",))
    assert code == 78
    assert "seed: 42 -> 7" in output
    assert f"runner checkpoints rm {world.uri}/bench" in output


def test_store_that_refuses_is_77_before_anything_is_fetched(world: World) -> None:
    world.proxy.fail("GET", "", "403 AccessDenied", times=10_000)
    code, output = world.first.train()
    assert code == 77, output
    assert "s3:ListBucket" in output
    assert not world.first.said("attempt")


def test_bucket_that_is_not_there_is_78(world: World) -> None:
    world.first.job["checkpoints"] = {"uri": "s3://no-such-bucket/x"}
    code, output = world.first.train()
    assert code == 78, output
    assert "there is no such bucket" in output


# --- notices ---


def test_stop_file_saves_and_leaves_with_75(world: World, undisturbed: str) -> None:
    first = world.first
    process = first.start(at("step:3", "wait"))
    first.wait_for(first.waiting(), process)
    (first.run / "stop").touch()
    code, output = process.finish()
    assert code == 75, output
    assert f"stop file {first.run / 'stop'}" in output
    assert not (first.run / "stop").exists()
    assert world.head().newest.step == 3
    assert world.machine().train()[0] == 0


def test_grace_too_short_to_save_finishes_what_is_under_way(
    world: World, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_GRACE_SECONDS", "1.05")
    first = world.first
    process = first.start(at("step:5", "linger"))
    first.wait_for(first.waiting(), process)
    first.wait_for(lambda: world.head().newest is not None and world.head().newest.step == 4)
    process.send(signal.SIGTERM)
    code, output = process.finish()
    assert code == 75, output
    assert "step 4 is committed" in output
    assert world.head().state == "released"
    second = world.machine()
    monkeypatch.delenv("RUNNER_GRACE_SECONDS")
    assert second.train()[0] == 0
    assert second.weights() == undisturbed


def test_grace_that_is_no_number_is_78(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_GRACE_SECONDS", "soon")
    code, output = world.first.train()
    assert code == 78
    assert "RUNNER_GRACE_SECONDS='soon'" in output


# --- memory ---


def test_machine_that_went_down_near_its_memory_limit_is_followed_with_a_smaller_batch(
    world: World, undisturbed: str
) -> None:
    first = world.first
    first.job["training"] = {"global_batch_size": 8}

    def near() -> None:
        hasty()
        from runner.supervisor import cgroup

        cgroup.pressure = lambda: 0.94  # type: ignore[assignment]
        from runner.supervisor import attempts

        attempts.NEAR = 0.9

    process = first.start(at("step:5", "wait"), before=near)
    first.wait_for(first.waiting(), process)
    first.wait_for(lambda: world.head().memory_peak == 0.94)
    os.kill(process.pid, signal.SIGKILL)
    second = world.machine()
    code, output = second.train(before=near)
    assert code == 0, output
    restart = second.result()["restarts"][0]
    assert restart["per_device"] == {"from": 8, "to": 4}
    assert "at 94% of the memory limit" in restart["reason"]
    assert second.weights() == undisturbed


# --- the trainer ---


def test_trainer_gets_no_credentials() -> None:
    given = {
        **ENVIRONMENT,
        "AWS_SESSION_TOKEN": "x",
        "HF_TOKEN": "hf_x",
        "PATH": "/bin",
        "WANDB_API_KEY": "w",
        "OMP_NUM_THREADS": "1",
    }
    left = environ_of_trainer(given, 1, "single", Machine(0, 2))
    assert not any(name.startswith(("AWS_", "HF_TOKEN", "WANDB_")) for name in left)
    assert (left["PATH"], left["OMP_NUM_THREADS"]) == ("/bin", "1")


def test_notice_ends_the_wait_for_a_store_that_never_answered(world: World) -> None:
    world.proxy.fail("GET", "", "503", times=10_000)
    process = world.first.start()
    world.first.wait_for(lambda: bool(world.first.said("store")), process)
    process.send(signal.SIGINT)
    code, output = process.finish()
    assert code == 75, output
    assert f"SIGINT: stopped while waiting for {world.uri}/bench" in output
