"""RUNNER_TERMINATION_LOG: what a container says when it ends, at every end, and never a secret."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner import cli
from runner.errors import DataError, Preempted
from runner.job.secrets import MASK, without_secrets
from runner.last_words import MOST, spoken, write
from tests.machines import Bench, at

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
PASSWORD = "correct horse battery"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "termination-log"
    file.write_text("of the container before, which was longer " * 200)
    monkeypatch.setenv("RUNNER_TERMINATION_LOG", str(file))
    return file


def said(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    assert len(data) <= MOST
    document: dict[str, Any] = json.loads(data)
    assert list(document) == ["outcome", "exit_code", "step", "checkpoint", "message"]
    assert "Traceback" not in document["message"]
    return document


# --- whole runs ---


def speaking() -> None:
    """In the forked command: it ends as the command line would."""
    from runner import launch

    train = launch.train

    def told(*arguments: Any, **options: Any) -> int:
        import os

        return spoken(os.environ, lambda: train(*arguments, **options))

    launch.train = told


def test_a_run_that_is_done_says_so(bench: Bench, log: Path) -> None:
    assert bench.train(before=speaking)[0] == 0
    checkpoint = bench.result()["checkpoint"]
    done = {"outcome": "done", "exit_code": 0, "step": 6, "checkpoint": checkpoint, "message": "done"}
    assert said(log) == done
    assert bench.train(before=speaking)[0] == 0
    assert said(log) == {**done, "message": "done already"}


def test_a_run_that_was_stopped_says_what_is_committed(bench: Bench, log: Path) -> None:
    process = bench.start(at("step:3", "wait"), before=speaking)
    bench.wait_for(bench.waiting(), process)
    process.send(signal.SIGTERM)
    assert process.finish()[0] == 75
    document = said(log)
    assert (document["outcome"], document["exit_code"], document["step"]) == ("preempted", 75, 3)
    assert document["checkpoint"] == "00000003-000001-0001"
    assert document["message"].startswith("SIGTERM: ")


def test_a_run_that_failed_says_why(bench: Bench, log: Path) -> None:
    assert bench.train(at("step:3", "crash:65"), before=speaking)[0] == 65
    document = said(log)
    assert (document["outcome"], document["exit_code"], document["step"]) == ("failed", 65, 2)
    assert "row 3 of data is bad" in document["message"]


def test_what_a_library_says_is_kept_without_credentials(
    bench: Bench, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In HEAD, the events and the result, as in the last words."""
    monkeypatch.setenv("WANDB_API_KEY", "row 3 of data")
    assert bench.train(at("step:3", "crash:65"), before=speaking)[0] == 65
    kept = [file.read_text() for file in (log, bench.run / "events.jsonl", bench.run / "result.json")]
    assert not any("row 3 of data" in text for text in (*kept, str(bench.head().record)))
    assert any(MASK in str(event.get("error")) for event in bench.said("end"))


# --- ends before anything began ---


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere.yaml"], 78, "nowhere.yaml"),
        (["--runs"], 64, "runner train: argument --runs"),
    ],
)
def test_an_end_before_anything_began(log: Path, words: list[str], code: int, message: str) -> None:
    assert cli.main(["train", *words]) == code
    document = said(log)
    assert (document["outcome"], document["exit_code"], document["step"]) == ("failed", code, None)
    assert message in document["message"]


def test_other_verbs_say_nothing(log: Path) -> None:
    before = log.read_bytes()
    assert cli.main(["validate", "nowhere.yaml"]) == 78
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("of ours"), 1, "ZeroDivisionError: this is a defect of vlm-runner"),
    ],
)
def test_an_end_that_is_no_decision(
    log: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fails(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fails)
    assert cli.main(["train"]) == code
    document = said(log)
    assert (document["exit_code"], document["outcome"]) == (code, "failed")
    assert document["message"].startswith(message)


# --- what is written ---


def failing(error: Exception) -> Callable[[], int]:
    def act() -> int:
        raise error

    return act


@pytest.mark.parametrize("text", ["é" * 9000, '"\\\n\x00' * 3000, "\udcff" * 5000, "😀" * 3000, ""])
def test_it_is_short_and_whole_whatever_the_message(tmp_path: Path, text: str) -> None:
    file = tmp_path / "log"
    environ = {"RUNNER_TERMINATION_LOG": str(file)}
    with pytest.raises(DataError):
        spoken(environ, failing(DataError(text)))
    document = said(file)
    if text:
        assert document["message"].endswith(" ...") and len(file.read_bytes()) >= MOST - 20


def test_it_holds_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "log"
    environ = {
        "RUNNER_TERMINATION_LOG": str(file),
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
        "WANDB_API_KEY": "0123456789abcdef",
        "SHORT_TOKEN": "a",
    }
    text = f"get https://me:{PASSWORD}@host with {TOKEN} and 0123456789abcdef failed"
    with pytest.raises(Preempted):
        spoken(environ, failing(Preempted(text)))
    written = file.read_text()
    assert not any(secret in written for secret in (TOKEN, PASSWORD, "0123456789abcdef"))
    assert said(file)["message"].startswith("get https://") and said(file)["message"].endswith(" failed")


def test_a_file_that_cannot_be_written_is_said_once_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_TERMINATION_LOG", str(tmp_path / "missing" / "log"))
    assert cli.main(["train", "nowhere.yaml"]) == 78
    said = capsys.readouterr().err
    assert said.count("RUNNER_TERMINATION_LOG") == 1 and "cannot be written" in said


def test_nobody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    write({}, "done", 0, "done")
    assert capsys.readouterr().err == ""
    assert without_secrets("nothing to hide", {}) == "nothing to hide"


def test_example_of_the_docs_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "notices.md").read_text("utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "log").write_text(example)
    assert said(tmp_path / "log")["outcome"] == "preempted"
