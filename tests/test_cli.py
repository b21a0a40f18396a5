"""The command line: exit codes, messages on the right stream, and no torch for `validate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner import cli
from runner.errors import DataError
from runner.schema.job import job_schema

ROOT = Path(__file__).parent.parent
GOOD = str(ROOT / "tests" / "data" / "good.yaml")
SIX = str(ROOT / "tests" / "data" / "six-mistakes.yaml")


def runner(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )


def test_validate_answers_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", GOOD, "lora.r=16"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("valid: good") and "1 overridden" in out and "LoRA r=16" in out and err == ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["launch.nodes=3"], "3 nodes cannot cut a global batch of 8 evenly"),
        (["launch.nodes=2", "launch.strategy=single"], "strategy single is one process"),
    ],
)
def test_validate_refuses_nodes_that_no_machine_makes_do(
    capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert cli.main(["validate", GOOD, "training.global_batch_size=8", *words]) == 78
    assert reason in capsys.readouterr().err


def test_validate_prints_six_problems_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", SIX]) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("    remedy: ") == 6 and err.count(f"{SIX}:") == 6
    assert "6 problems in the job; nothing was started" in err


def test_options_and_overrides_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "lora.r=4", "--resolved", GOOD, "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "seed: 3 " in out and "r: 4 " in out and "# command line" in out


def test_job_yaml_alone_is_a_job() -> None:
    done = runner("validate", JOB_YAML=Path(GOOD).read_text())
    assert done.returncode == 0 and "JOB_YAML" in done.stdout
    done = runner("validate", JOB_FILE=GOOD, JOB__TRAINNIG__LEARNING_RATE="1e-5")
    assert done.returncode == 78 and "JOB__TRAINING__LEARNING_RATE" in done.stderr


def test_schema_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    upstream = json.loads((ROOT / "runner" / "schema" / "upstream.json").read_text("utf-8"))
    assert json.loads(capsys.readouterr().out) == job_schema(upstream)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["validat"],
        ["--frob"],
        ["validate", "--frob"],
        ["validate", "--resolve", GOOD],
        ["validate", GOOD, SIX],
        ["validate", GOOD, "=3"],
        ["train", GOOD, "--runs"],
        ["schema", "x"],
    ],
)
def test_usage_errors_are_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 64
    assert capsys.readouterr().err or not argv


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_examples_that_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: runner {verb}" in out and f"  runner {verb}" in out


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("runner ")


def test_verbs_reach_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Launch:
        @staticmethod
        def train(resolved: Any, runs: Path, *, voice: str) -> int:
            calls.append((resolved.job.name, runs, voice))
            return 75

        @staticmethod
        def evaluate(resolved: Any, runs: Path, adapter: str | None, *, voice: str) -> int:
            calls.append((resolved.job.name, runs, adapter, voice))
            raise DataError("read rows of x: gone\n    remedy: bring it back")

    import runner

    monkeypatch.setitem(sys.modules, "runner.launch", Launch)
    monkeypatch.setattr(runner, "launch", Launch, raising=False)
    assert cli.main(["train", GOOD, "name=other", "--runs", "there"]) == 75
    assert cli.main(["evaluate", GOOD, "--adapter", "a", "--json"]) == 65
    assert calls == [("other", Path("there"), "lines"), ("good", Path("runs"), "a", "json")]
    assert cli.main(["train", GOOD, "--quiet", "--json"]) == 64


def test_a_defect_is_one_line_and_a_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("runner.settings.resolve", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["validate", GOOD]) == 1
    err = capsys.readouterr().err
    assert "defect of vlm-runner" in err and len(err.splitlines()) == 1
    assert "secret detail" in next(tmp_path.glob("runner-defect-*.log")).read_text()
    monkeypatch.setenv("RUNNER_DEBUG", "1")
    assert cli.main(["validate", GOOD]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runner.settings.resolve", interrupted)
    assert cli.main(["validate", GOOD]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_is_no_failure() -> None:
    command = f"set -o pipefail; {sys.executable} -m runner schema | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_a_full_disk_is_a_storage_error() -> None:
    command = f"{sys.executable} -m runner schema > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 74 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_closed_stdout_is_no_traceback() -> None:
    command = f"{sys.executable} -m runner validate {GOOD} >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and done.returncode == 0


def test_validate_loads_little() -> None:
    """Nothing heavy, and few modules of any kind: what bench/validate.py measures is their import."""
    program = (
        "import sys\nfrom runner.cli import main\ncode = main(['validate', sys.argv[1]])\n"
        "heavy = {'torch', 'transformers', 'boto3', 'datasets', 'numpy', 'trl', 'peft', 'PIL', 'rich'}\n"
        "print(code, sorted(heavy & set(sys.modules)), len(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program, GOOD], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    code, heavy, modules = printed.splitlines()[-1].split()
    assert (code, heavy) == ("0", "[]")
    assert int(modules) < 400


@pytest.mark.parametrize("words", [["report"], ["status"], ["export", "--to", "new"]])
@pytest.mark.parametrize(("run", "code"), [("runs/nope", 65), ("nope", 65), ("nope.yaml", 78)])
def test_a_run_that_is_not_there_is_no_broken_job(
    words: list[str], run: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, run]) == code
    said = capsys.readouterr().err
    if code == 65:
        assert said.startswith(f"{words[0]}: {run} is not there; remedy: name a run as its folder")
    else:
        assert "the job file cannot be read" in said


def test_what_to_edit_is_the_job_and_not_where_runs_are(tmp_path: Path, capsys: Any) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: [\n")
    assert cli.main(["train", "--runs", str(tmp_path / "elsewhere"), str(job)]) == 78
    assert f"next: edit {job}, then: " in capsys.readouterr().err
