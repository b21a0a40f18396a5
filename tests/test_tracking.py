"""Trackers, the real libraries offline: one run of three attempts in each, and trackers that break."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.cli import main
from runner.supervisor import trackers
from runner.tracking import choice
from tests.machines import Bench, at

ROOT = Path(__file__).parents[1]
TRACKIO = ROOT / ".venv" / "trackio"
"""Beside the packages of .venv (Makefile)."""

PRESENT = [name for name in choice.TRACKERS if name != "trackio" or TRACKIO.is_dir()]

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "aws-secret-of-this-test",
    "HF_TOKEN": "hf_secretsecretsecretsecret",
    "MY_PASSWORD": "password-of-this-test",
    "SOME_API_KEY": "key-of-this-test-0123456789",
    "DATABRICKS_TOKEN": "databricks-secret-of-this-test",
}


def ready(wait: float) -> Callable[[], None]:
    """In the forked command: where trackio lies, and how long trackers have at the end."""

    def before() -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TRACKIO)])
        sys.path.append(str(TRACKIO))
        os.environ.update(SECRETS)
        trackers.WAIT = trackers.WAIT_NOTICED = wait

    return before


def logged(bench: Bench) -> bool:
    """Whether every tracker that writes at once has written steps."""
    folder = bench.run / "tracking"
    signs = {
        "tensorboard": lambda: any(path.stat().st_size > 1500 for path in folder.glob("tensorboard/events*")),
        "wandb": lambda: any(folder.glob("wandb/wandb/offline-run-*/*.wandb")),
        "mlflow": lambda: any(folder.glob("mlflow/*/*/metrics/train/loss")),
        "trackio": lambda: any(folder.glob("trackio/*.db*")),
    }
    return all(signs[name]() for name in PRESENT)


@pytest.fixture(scope="module")
def thrice(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A run that was killed with its supervisor, then asked to stop, then done."""
    bench = Bench(tmp_path_factory.mktemp("thrice"))
    bench.job["training"] = {"report_to": PRESENT, "project": "charts", "num_train_epochs": 2}
    bench.job["lora"] = {
        **bench.job.get("lora", {}),
        "rank_pattern": {"^(q|v)_proj$": 4},
    }  # no name in mlflow
    settings: dict[str, Any] = {"record": True, "steps": 9, "before": ready(60)}
    for attempt, step, number, code in ((1, 4, signal.SIGKILL, -9), (2, 7, signal.SIGTERM, 75)):
        command = bench.start(at(f"step:{step}", "wait", attempt), **settings)
        bench.wait_for(bench.waiting(attempt), command)
        deadline = time.monotonic() + 50
        while not logged(bench):
            logs = [path.read_text() for path in bench.run.glob("tracking/*.log")]
            assert time.monotonic() < deadline, logs
            time.sleep(0.05)
        command.send(number)
        assert command.finish()[0] == code
    code, output = bench.train(**settings)
    assert code == 0, output
    assert "warning: tracker" not in output
    return bench


def read(name: str, folder: Path) -> dict[str, Any]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TRACKIO)])}
    command = [sys.executable, str(ROOT / "tests" / "read_tracker.py"), name, str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.parametrize("name", choice.TRACKERS)
def test_a_run_of_three_attempts_has_each_step_once(thrice: Bench, name: str) -> None:
    if name not in PRESENT:
        pytest.skip("make .venv/trackio")
    found = read(name, thrice.run / "tracking" / name)
    assert found["runs"] == 1
    (newest,) = (thrice.run / "newest").iterdir()
    steps = [json.loads(line) for line in (newest / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 10))
    for field in ("loss", "grad_norm", "learning_rate", "tokens", "images"):
        told = found["metrics"][f"train/{field}"]
        expected = [(step["step"], step[field]) for step in steps if step[field] is not None]
        assert [step for step, _ in told] == [step for step, _ in expected], field
        for (_, value), (_, true) in zip(told, expected, strict=True):
            assert math.isclose(value, true, rel_tol=1e-7 if name == "tensorboard" else 0), field
    assert [step for step, _ in found["metrics"]["train/seconds"]] == list(range(1, 10))
    assert found["metrics"]["eval/relaxed_accuracy"] == [[0, 0.25]]
    assert "num_train_epochs" in found["words"]
    assert "outcome" in found["words"] or "exit code 0" in found["words"]


def test_no_file_of_a_tracker_has_a_secret(thrice: Bench) -> None:
    files = [path for path in (thrice.run / "tracking").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in data, f"{name} in {path}"


# --- trackers that break ---


def package(folder: Path, name: str, source: str) -> None:
    """A library of this name that does something else."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


BROKEN = {
    "raises": "raise OSError('no luck with hf_secretsecretsecretsecret')",
    "hangs": "import time\ntime.sleep(600)",
    "exits": "import os\nos._exit(0)",
    "is killed": "import os\nos.kill(os.getpid(), 9)",
    "talks": "import sys\nwhile True:\n    sys.stdout.write('x' * 100_000)",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_tracker_changes_nothing(bench: Bench, undisturbed: str, how: str) -> None:
    package(bench.path / "broken", "trackio", BROKEN[how])
    bench.job["training"] = {"report_to": "trackio"}

    def before() -> None:
        ready(1.0)()
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(bench.path / "broken")])
        sys.path.insert(0, str(bench.path / "broken"))

    began = time.monotonic()
    code, output = bench.train(record=True, before=before)
    assert code == 0, output
    assert bench.weights() == undisturbed
    warnings = [one["message"] for one in bench.said("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("tracker trackio: "), warnings
    assert "hf_secret" not in output + (bench.run / "tracking" / "trackio.log").read_text()
    assert (bench.run / "tracking" / "trackio.log").stat().st_size <= 1 << 20
    assert time.monotonic() - began < 30
    assert bench.head().state == "done"


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("server", ["refuses", "is silent"])
def test_a_server_that_does_not_answer_changes_nothing(
    bench: Bench, undisturbed: str, silent: str, server: str
) -> None:
    bench.job["training"] = {"report_to": "mlflow"}
    uri = silent if server == "is silent" else "http://127.0.0.1:9"

    def before() -> None:
        ready(0.5)()
        os.environ["MLFLOW_TRACKING_URI"] = uri.replace("http://", "http://me:secret-of-the-server@")

    code, output = bench.train(record=True, before=before)
    assert code == 0, output
    assert bench.weights() == undisturbed
    (warning,) = bench.said("warning")
    assert warning["message"].startswith("tracker mlflow: it did not finish in ")
    for path in (bench.run / "tracking").rglob("*"):
        assert path.is_dir() or b"secret-of-the-server" not in path.read_bytes()


def test_validate_warns_of_a_missing_package(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = bench.path / "job.yaml"
    job.write_text(json.dumps({**bench.job, "training": {"report_to": ["tensorboard", "trackio"]}}))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(TRACKIO)])
    assert main(["validate", str(job)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("valid: bench")
    assert "warning: training.report_to: trackio is not installed here: pip install" in said.err


def test_a_missing_package_is_told_before_anything_is_done(bench: Bench) -> None:
    bench.job["training"] = {"report_to": ["tensorboard", "trackio"]}
    (bench.path / "trackio").mkdir()  # where the command runs: a folder of that name is no package
    code, output = bench.train()
    assert code == 78
    assert "trackio cannot be imported by" in output
    assert "pip install 'vlm-runner[trackio]'" in output
    assert not bench.run.exists()
