"""The README is true: every command in it runs; the two demos are in tests/test_demos.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.supervisor import identity
from tests.pages import commands
from tests.s3_server import ENVIRONMENT, s3_server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BIN = Path(sys.executable).parent
COMMANDS = commands(README)
LIGHT = [command for command in COMMANDS if not command.startswith("make")]


def shell(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As a person types it, with this environment's runner."""
    return subprocess.run(
        ["bash", "-c", command.replace(".venv/bin/", f"{BIN}/")],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "RUNNER_REPORT": "on", **environment},
    )


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The reader's bucket, and the environment that leads there."""
    with s3_server() as port:
        yield {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader saved the README's job."""
    folder = tmp_path_factory.mktemp("reader")
    jobs = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(jobs) == 1
    (folder / "my-job.yaml").write_text(jobs[0])
    return folder


def test_it_is_short_enough_to_read() -> None:
    assert len(README.splitlines()) <= 150


def test_the_commands_were_found() -> None:
    assert {"make train JOB=jobs/demo-sft.yaml", "make test"} <= set(COMMANDS)
    assert len(LIGHT) >= 6


@pytest.mark.parametrize("command", LIGHT)
def test_a_command_of_the_readme_runs(command: str, folder: Path, bucket: dict[str, str]) -> None:
    """In order, in one folder: what `train` leaves is what `evaluate` reads."""
    done = shell(command, folder, bucket)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_job_of_the_readme_leaves_what_the_readme_lists(folder: Path) -> None:
    listed = re.search(r"runs/<name>/\n(.*?)```", README, re.DOTALL)
    assert listed is not None
    names = re.findall(r"^  (\S+)", listed[1], re.MULTILINE)
    assert "result.json" in names
    for name in names:
        assert list((folder / "runs" / "my-charts").glob(name.replace("<n>", "*"))), name


def test_the_adapter_loads_with_plain_peft(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from runner.demo import resolve_model

    base = AutoModelForImageTextToText.from_pretrained(resolve_model("demo:smolvlm-tiny"))
    adapted = PeftModel.from_pretrained(base, folder / "runs" / "my-charts" / "adapter")
    moved = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert moved
    assert any(p.abs().sum() > 0 for p in moved)


def test_what_may_change_between_two_commands_is_what_the_code_lets_change() -> None:
    table = (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
    free, said = re.findall(r"^\| (`.*?) \| (?:nothing|it is said)", table, re.MULTILINE)
    for cell, patterns in ((free, identity.FREE), (said, identity.SAID)):
        assert [name.rstrip("*") for name in re.findall(r"`(.*?)`", cell)] == [
            name.rstrip("*") for name in patterns
        ]
