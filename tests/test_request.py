"""What a supervisor asks of its trainer: as a file, as the trainer's decisions, and in a real process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from runner import request
from runner.errors import AccessDenied, Preempted, RunnerError
from runner.request import FILE, GO, Reader, Request
from runner.train.callbacks import POLL, SaveAndStop
from tests.attempts import JOB, merged, run

# --- the file ---


def test_what_is_written_is_read_and_no_file_is_go(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    assert reader.now() == GO
    for asked in (Request("wait", "behind", 37.5), Request("stop", "SIGTERM"), Request("go")):
        request.write(tmp_path, asked)
        assert reader.now() == asked
    (tmp_path / FILE).unlink()
    assert reader.now() == GO


def test_what_older_supervisors_write_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": 1, "action": "stop", "reason": "SIGTERM"}')
    assert Reader(tmp_path).now() == Request("stop", "SIGTERM")


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), plain(path))[1])
    reader = Reader(tmp_path)
    for asked in (Request("wait"), Request("stop")):  # of one length: only the file is another
        request.write(tmp_path, asked)
        assert [reader.now().action for _ in range(5)] == [asked.action] * 5
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file: Invalid JSON"),
        (b'{"format": 1, "action": "st', "the file: Invalid JSON"),
        (b'{"format": 2, "action": "go"}', "format: "),
        (b'{"format": 1, "action": "pause"}', "action: "),
        (b'{"format": 1, "action": "go", "save_seconds": -1}', "save_seconds: "),
        (b'{"format": 1, "action": "go", "seconds": 1}', "seconds: "),
    ],
)
def test_what_is_no_request_is_a_defect_of_ours(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunnerError, match="a defect of the runner; remedy: ") as caught:
        Reader(tmp_path).now()
    assert f"{tmp_path / FILE}: {why}" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_folder_without_rights_is_named(tmp_path: Path) -> None:
    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:  # root may read everything
        patch.setattr(Path, "stat", refuse)
        with pytest.raises(AccessDenied, match="read the supervisor's request"):
            Reader(tmp_path).now()


# --- the decisions ---


class Trainer:
    """The loop that calls the callback: steps of ten seconds, saves of one, on a clock of its own."""

    def __init__(self, folder: Path, save_seconds: float = 1e9, steps: int = 6) -> None:
        self.asked = GO
        self.now = 0.0
        self.told: list[Any] = []
        self.while_waiting: Callable[[], None] = lambda: None
        self.args = TrainingArguments(output_dir=str(folder), use_cpu=True)
        self.state = TrainerState(global_step=0, max_steps=steps)
        self.callback = SaveAndStop(
            save_steps=None,
            save_seconds=save_seconds,
            request=lambda: self.asked,
            tell_phase=self.told.append,
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.while_waiting()
        assert self.now < 10_000, "it waits for ever"

    def train(self, at: dict[int, Request] | None = None) -> list[Any]:
        """Everything that happened, in order: steps as numbers, saves, and the phases that were told.

        Args:
            at: what is asked for in the middle of a step.
        """
        control = TrainerControl()
        self.callback.on_train_begin(self.args, self.state, control)
        while self.state.global_step < self.state.max_steps and not control.should_training_stop:
            control.should_save = False
            self.now += 10
            self.asked = (at or {}).get(self.state.global_step + 1, self.asked)
            self.state.global_step += 1
            self.told.append(self.state.global_step)
            control = self.callback.on_step_end(self.args, self.state, control)
            if control.should_save:
                self.now += 1
                self.told.append("save")
                control = self.callback.on_save(self.args, self.state, control)
        return self.told


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def after(trainer: Trainer, seconds: float, asked: Request) -> None:
    """While it waits: ask for something else, that much later."""
    until = seconds

    def look() -> None:
        nonlocal until
        until -= POLL
        if until <= 0:
            trainer.asked = asked

    trainer.while_waiting = look


def test_a_wait_saves_what_was_done_and_goes_on(trainer: Trainer) -> None:
    after(trainer, 60, GO)
    assert trainer.train({2: Request("wait")}) == [1, 2, "save", "wait", "train", 3, 4, 5, 6, "save"]
    assert trainer.now == pytest.approx(6 * 10 + 2 + 60)
    assert not trainer.callback.stopped


def test_a_wait_before_the_first_step_has_nothing_to_save(trainer: Trainer) -> None:
    trainer.asked = Request("wait")
    after(trainer, 60, GO)
    assert trainer.train() == ["wait", "train", 1, 2, 3, 4, 5, 6, "save"]


def test_waiting_is_no_training_time(tmp_path: Path) -> None:
    """Saves come 25 seconds of training after the last one: after 3 steps of 10."""
    undisturbed = Trainer(tmp_path, save_seconds=25, steps=7).train()
    assert undisturbed == [1, 2, 3, "save", 4, 5, 6, "save", 7, "save"]
    trainer = Trainer(tmp_path, save_seconds=25, steps=7)
    trainer.asked = Request("wait")
    after(trainer, 1000, GO)
    assert trainer.train() == ["wait", "train", *undisturbed]
    trainer = Trainer(tmp_path, save_seconds=25, steps=7)
    after(trainer, 1000, GO)
    assert trainer.train({3: Request("wait")})[:9] == [1, 2, 3, "save", "wait", "train", 4, 5, 6]
    assert trainer.told[9:] == ["save", 7, "save"]


def test_a_stop_that_replaces_a_wait_stops(trainer: Trainer) -> None:
    after(trainer, 60, Request("stop"))
    assert trainer.train({2: Request("wait")}) == [1, 2, "save", "wait"]
    assert trainer.callback.stopped


def test_a_stop_that_replaces_a_wait_before_the_first_step_stops(trainer: Trainer) -> None:
    trainer.asked = Request("wait")
    after(trainer, 60, Request("stop"))
    with pytest.raises(Preempted, match="before training"):
        trainer.train()
    assert trainer.told == ["wait"]


def test_a_stop_saves_once_and_stops(trainer: Trainer) -> None:
    assert trainer.train({3: Request("stop")}) == [1, 2, 3, "save"]
    assert trainer.callback.stopped


def test_nothing_waits_after_the_last_step(trainer: Trainer) -> None:
    assert trainer.train({6: Request("wait")}) == [1, 2, 3, 4, 5, 6, "save"]
    assert not trainer.callback.stopped


def test_a_wait_that_is_taken_back_before_the_save_is_over_is_none(trainer: Trainer) -> None:
    control = TrainerControl()
    trainer.state.global_step, trainer.asked = 1, Request("wait")
    trainer.callback.on_step_end(trainer.args, trainer.state, control)
    assert control.should_save
    trainer.asked = GO
    trainer.callback.on_save(trainer.args, trainer.state, control)
    assert trainer.told == []


def test_a_save_interval_holds_from_then_on(trainer: Trainer) -> None:
    often, seldom = Request("go", save_seconds=5), Request("go", save_seconds=1e9)
    saved = [1, 2, "save", 3, "save", 4, 5, 6, "save"]
    assert trainer.train({2: often, 3: GO, 4: seldom}) == saved


def test_an_advice_saves_once_at_the_next_step_whatever_else_is_asked(trainer: Trainer) -> None:
    once, twice = Request(saves=1), Request(saves=2)
    saved = [1, 2, "save", 3, 4, "save", 5, 6, "save"]
    assert trainer.train({2: once, 4: twice, 5: dataclasses.replace(twice, save_seconds=1e9)}) == saved


def test_a_save_interval_comes_with_a_wait_too(trainer: Trainer) -> None:
    after(trainer, 60, Request("go", save_seconds=15))
    asked = {2: dataclasses.replace(Request("wait"), save_seconds=5)}
    assert trainer.train(asked) == [1, 2, "save", "wait", "train", 3, 4, "save", 5, 6, "save"]


# --- a real process ---

CHANGES = merged(
    JOB,
    {
        "lora": {"lora_dropout": 0.2},
        "training": {
            "per_device_train_batch_size": 8,
            "num_train_epochs": 4,
            "dataloader_num_workers": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
        },
        "datasets": {"eval": [{**JOB["datasets"]["train"][0], "split": "val[:4]"}]},
    },
)
"""Eight steps, with what draws random numbers and what reads ahead."""

SAME = ("steps.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def test_a_run_that_waited_and_stopped_is_the_same_run(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    outcome, _ = run(whole, CHANGES)
    assert outcome["outcome"] == "done", outcome["error"]

    asked = tmp_path / "asked"
    first, second = asked / "attempts" / "1", asked / "attempts" / "2"
    waited: list[list[str]] = []

    def saved() -> list[str]:
        return sorted(path.name for path in (asked / "outbox").iterdir())

    def go_then_stop(event: dict[str, Any]) -> None:
        """Wait at the first step; go on and save every step; wait again at the second save; stop."""
        if event["event"] == "begin" and event["step"] == 1:
            request.write(first, Request("wait", "behind"))
        elif event.get("phase") == "wait":
            waited.append(saved())
            now = Request("go", save_seconds=0) if len(waited) == 1 else Request("stop")
            request.write(first, now)
        elif event["event"] == "checkpoint" and len(waited) == 1:
            request.write(first, Request("wait"))

    outcome, events = run(asked, CHANGES, on_event=go_then_stop)
    assert (outcome["outcome"], outcome["exit_code"]) == ("preempted", 75), outcome
    assert len(waited[0]) == 1 < len(waited[1])
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases[-2:] == ["train", "wait"]
    assert phases.count("wait") == 2

    def wait_at_first(event: dict[str, Any]) -> None:
        if event.get("phase") == "data":
            request.write(second, Request("wait"))
        elif event.get("phase") == "wait":
            (second / FILE).unlink()

    newest = asked / "outbox" / saved()[-1]
    outcome, events = run(asked, CHANGES, on_event=wait_at_first, attempt=2, restore=newest)
    assert outcome["outcome"] == "done", outcome["error"]
    told = [event.get("phase", event["event"]) for event in events]
    assert told.index("wait") < told.index("begin")
    for name in SAME:
        assert (asked / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_request_that_cannot_be_read_ends_the_attempt_by_name(tmp_path: Path) -> None:
    def garble(event: dict[str, Any]) -> None:
        if event["event"] == "begin" and event["step"] == 1:
            (tmp_path / "attempts" / "1" / FILE).write_text("stop!")

    outcome, _ = run(tmp_path, CHANGES, on_event=garble)
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 1)
    assert "a defect of the runner" in outcome["error"]


def test_an_advice_costs_one_save_and_training_goes_on(tmp_path: Path) -> None:
    def advise(event: dict[str, Any]) -> None:
        if event["event"] == "begin" and event["step"] == 1:
            request.write(tmp_path / "attempts" / "1", Request(saves=1))

    outcome, events = run(tmp_path, {}, on_event=advise)
    assert (outcome["outcome"], outcome["step"]) == ("done", 4), outcome
    first, last = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert first < last == 4
