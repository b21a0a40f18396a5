"""`runner submit | logs | cancel` on AWS Batch, and a job that travels through the store: moto's server."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from runner import cli
from runner.cluster import act, aws_batch, batch_jobs
from runner.cluster import batch as batch_module
from runner.job import file as job_file
from runner.targets import render, submission
from tests.batch_server import QUEUE, batch_server, become, with_queue
from tests.cluster_jobs import (
    BATCH,
    PLANTED,
    documented,
    documented_commands,
    plant,
    resolved,
    written,
)
from tests.fault_proxy import FaultProxy
from tests.s3_server import BUCKET, ENVIRONMENT

NOTE = "What a person may write into a job, at length. " * 2_200
"""100 KB that no training sees."""

TO = ["--to", "aws-batch"]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with batch_server() as number:
        endpoint = f"http://127.0.0.1:{number}"
        clients = [_client(name, endpoint) for name in ("batch", "iam")]
        with_queue(*clients)
        yield number
        for service in ("batch", "iam", "s3"):
            _client(service, endpoint).close()
        _client.cache_clear()


@pytest.fixture
def proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to the server, in the environment; every job of an earlier test has ended."""
    monkeypatch.setattr(aws_batch, "PAUSE", 0.0)
    with FaultProxy(port) as between:
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": between.url}
        yield between
    batch = _client("batch", f"http://127.0.0.1:{port}")
    for status in batch_module.ALIVE:
        for job in batch.list_jobs(jobQueue=QUEUE, jobStatus=status)["jobSummaryList"]:
            batch.terminate_job(jobId=job["jobId"], reason="end of test")
    for one in _definitions(port):
        batch.deregister_job_definition(jobDefinition=one["jobDefinitionArn"])


@pytest.fixture
def job(tmp_path: Path) -> str:
    return written(tmp_path, BATCH)


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A job of 100 KB."""
    columns = {"image": "image", "question": "query", "answer": "label"}
    train = [{"path": "demo:charts", "format": "vqa", "split": "train[:8]", "columns": columns}]
    kubernetes = {"annotations": {"team/note": NOTE}}
    file = written(tmp_path, {**BATCH, "datasets": {"train": train}, "kubernetes": kubernetes})
    assert Path(file).stat().st_size > 100_000
    return file


@functools.cache
def _client(service: str, endpoint: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def _definitions(port: int) -> list[dict[str, Any]]:
    client = _client("batch", f"http://127.0.0.1:{port}")
    found: list[dict[str, Any]] = client.describe_job_definitions(status="ACTIVE")["jobDefinitions"]
    return found


def _jobs(port: int) -> list[dict[str, Any]]:
    """All that are alive, described."""
    client = _client("batch", f"http://127.0.0.1:{port}")
    listed = client.list_jobs(jobQueue=QUEUE, jobStatus="RUNNABLE")["jobSummaryList"]
    identities = [one["jobId"] for one in listed]
    found: list[dict[str, Any]] = client.describe_jobs(jobs=identities)["jobs"] if identities else []
    return found


def _stored(port: int) -> dict[str, bytes]:
    client = _client("s3", f"http://127.0.0.1:{port}")
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def submitted(job: str, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Name and id."""
    code, out, err = run(capsys, "submit", job, *words)
    assert (code, err) == (0, "")
    return _names(out)


def _names(out: str) -> tuple[str, str]:
    found = re.match(r"submitted (\S+) to queue spot: (\S+)\n", out)
    assert found is not None
    return found[1], found[2]


# --- submit ---


def test_what_is_registered_and_submitted_is_what_render_prints(
    proxy: FaultProxy, port: int, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "submit", job)
    assert (code, err) == (0, "")
    name, identity = _names(out)
    definition, submit = render("aws-batch", submission(resolved(job), name))
    [registered] = _definitions(port)
    printed = definition["RegisterJobDefinition"]
    for key in ("jobDefinitionName", "type", "platformCapabilities", "propagateTags", "tags"):
        assert registered[key] == printed[key], key
    kept = {key: registered["containerProperties"][key] for key in printed["containerProperties"]}
    assert kept == printed["containerProperties"]
    rules = [
        {**rule, "action": rule["action"].lower()} for rule in printed["retryStrategy"]["evaluateOnExit"]
    ]
    assert registered["retryStrategy"] == {**printed["retryStrategy"], "evaluateOnExit": rules}
    [made] = _jobs(port)
    assert (made["jobId"], made["jobName"]) == (identity, submit["SubmitJob"]["jobName"])
    assert made["jobDefinition"] == registered["jobDefinitionArn"]
    assert f"AWS_REGION=us-east-1 runner logs {identity} --follow" in out
    given = submit["SubmitJob"]["containerOverrides"]["environment"]
    assert all(one in made["container"]["environment"] for one in given)
    assert _stored(port) == {}


def test_a_run_has_one_submission_at_a_time(
    proxy: FaultProxy, port: int, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, identity = submitted(job, capsys)
    code, _, err = run(capsys, "submit", job)
    assert code == 76 and f"{name} ({identity}) is RUNNABLE" in err and "runner cancel" in err
    assert len(_jobs(port)) == len(_definitions(port)) == 1
    submitted(job, capsys, "name=charts-other")
    become(port, identity, status="FAILED")
    submitted(job, capsys)


@pytest.mark.parametrize(
    ("words", "environ", "code", "says"),
    [
        (["aws_batch.queue=none"], {}, 78, "Job queue none does not exist"),
        ([], {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 77, "no credentials were found"),
        ([], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 74, "check the network and the region"),
        ([], {"AWS_PROFILE": "none"}, 77, "could not be found"),
        (["aws_batch.region=no such region"], {}, 78, "name a region"),
    ],
)
def test_what_is_refused_leaves_nothing(
    proxy: FaultProxy,
    port: int,
    job: str,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    environ: dict[str, str],
    code: int,
    says: str,
) -> None:
    for name, value in environ.items():
        os.environ[name] = value
        if not value:
            del os.environ[name]
    got, out, err = run(capsys, "submit", job, *words)
    os.environ.pop("AWS_PROFILE", None)
    assert (got, out) == (code, "") and says in err and "remedy: " in err and "Traceback" not in err, err
    assert _definitions(port) == _jobs(port) == []


STEPS = [("POST", "/v1/listjobs"), ("POST", "/v1/describejobdefinitions"), ("PUT", r"charts-\w{5}\.yaml")]
STEPS += [("POST", "/v1/registerjobdefinition"), ("POST", "/v1/submitjob")]


@pytest.mark.parametrize("how", ["before", "after", "403 AccessDeniedException"])
@pytest.mark.parametrize(("method", "path"), STEPS)
def test_a_failure_of_any_request_leaves_nothing(
    proxy: FaultProxy,
    port: int,
    large: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    how: str,
) -> None:
    """Cut before or after the server acted, or refused."""
    monkeypatch.setattr(batch_jobs, "STORE_PATIENCE", 0.0)
    fault = proxy.fail(method, path, how)
    code, out, err = run(capsys, "submit", large, *TO)
    assert (code, out) == (77 if how[0] == "4" else 74, ""), err
    assert fault.met == 1
    assert _definitions(port) == _jobs(port) == [] and _stored(port) == {}


def test_a_job_has_the_revision_that_was_registered_with_it(
    proxy: FaultProxy,
    port: int,
    job: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where somebody else registers the next one meanwhile."""
    called = batch_module.Batch.call

    def overtaken(batch: Any, operation: str, **fields: Any) -> Any:
        answer = called(batch, operation, **fields)
        if operation == "RegisterJobDefinition":
            called(batch, operation, **fields)
        return answer

    monkeypatch.setattr(batch_module.Batch, "call", overtaken)
    submitted(job, capsys)
    [made] = _jobs(port)
    first, second = sorted(_definitions(port), key=lambda one: int(one["revision"]))
    assert made["jobDefinition"] == first["jobDefinitionArn"] != second["jobDefinitionArn"]


def test_ctrl_c_leaves_nothing(
    proxy: FaultProxy,
    port: int,
    large: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = batch_module.Batch.call

    def interrupted(batch: Any, operation: str, **fields: Any) -> Any:
        if operation == "SubmitJob":
            os.kill(os.getpid(), signal.SIGINT)
        return called(batch, operation, **fields)

    monkeypatch.setattr(batch_module.Batch, "call", interrupted)
    code, _, err = run(capsys, "submit", large, *TO)
    assert code == 130 and err == "interrupted\n"
    assert _definitions(port) == _jobs(port) == [] and _stored(port) == {}


def test_no_secret_of_the_environment_is_registered_or_stored(
    proxy: FaultProxy, port: int, large: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant()
    submitted(large, capsys, *TO)
    everything = f"{_definitions(port)} {_jobs(port)} {_stored(port)}"
    assert "JOB_FILE" in everything and PLANTED not in everything
    _forget(port)


def _forget(port: int) -> None:
    client = _client("s3", f"http://127.0.0.1:{port}")
    for key in _stored(port):
        client.delete_object(Bucket=BUCKET, Key=key)


# --- a job in the store ---


def test_a_large_job_travels_through_the_store_and_trains(
    proxy: FaultProxy, port: int, large: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The container's own command and variables, run here."""
    words = ["training.max_steps=1", "training.global_batch_size=1", "checkpoints.uri=s3://bucket/large"]
    words += ["training.per_device_train_batch_size=1"]
    name, _ = submitted(large, capsys, *TO, *words)
    address = f"large/charts/submissions/{name}.yaml"
    assert list(_stored(port)) == [address]
    [made] = _jobs(port)
    variables = {one["name"]: one["value"] for one in made["container"]["environment"]}
    assert variables["JOB_FILE"] == f"s3://bucket/{address}" and "JOB_YAML" not in variables
    [definition] = _definitions(port)
    command = definition["containerProperties"]["command"]
    command = [str(tmp_path / "runs") if word == "/scratch/runs" else word for word in command]
    environ = {**os.environ, "JOB_FILE": variables["JOB_FILE"]}
    for argv in (["validate"], command):
        done = subprocess.run(
            [sys.executable, "-m", "runner", *argv],
            env=environ,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "large/charts/HEAD" in _stored(port)
    _forget(port)


def test_a_job_file_in_a_bucket(
    proxy: FaultProxy,
    port: int,
    job: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = _client("s3", f"http://127.0.0.1:{port}")
    for key in ("job.yaml", "a/b/job.yaml"):
        client.put_object(Bucket=BUCKET, Key=key, Body=Path(job).read_bytes())
        os.environ["JOB_FILE"] = f"s3://bucket/{key}"
        code, out, err = run(capsys, "validate")
        assert (code, err) == (0, "") and f"valid: charts (s3://bucket/{key})" in out
    code, out, _ = run(capsys, "validate", "s3://bucket/job.yaml", "--resolved")
    assert code == 0 and "# s3://bucket/job.yaml:1" in out

    client.put_object(Bucket=BUCKET, Key="huge", Body=b"# " + b"x" * job_file.LARGEST)
    client.put_object(Bucket=BUCKET, Key="wrong", Body=b"nmae: charts\n")
    for address, code, says in (
        ("bucket/none.yaml", 78, "there is no such object"),
        ("no-bucket/job.yaml", 78, "there is no such bucket"),
        ("bucket/", 78, "not the address of an object"),
        ("B!/x", 78, "not a place in S3"),
        ("bucket/huge", 78, "larger than"),
        ("bucket/wrong", 78, "s3://bucket/wrong:1:1: nmae"),
    ):
        got, _, err = run(capsys, "validate", f"s3://{address}")
        assert got == code and says in err and "checkpoints.uri" not in err, err
    proxy.fail("GET", "/bucket/job.yaml", "403 AccessDenied")
    got, _, err = run(capsys, "validate", "s3://bucket/job.yaml")
    assert got == 77 and "AccessDenied" in err
    monkeypatch.setattr(job_file, "PATIENCE", 0.0)
    proxy.fail("GET", "/bucket/job.yaml", "truncate")
    got, _, err = run(capsys, "validate", "s3://bucket/job.yaml")
    assert got == 74 and "Traceback" not in err
    _forget(port)


def test_a_local_file_loads_no_client(job: str) -> None:
    script = "import sys; from runner.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    argv = [sys.executable, "-c", script, "validate", job]
    loaded = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    assert "runner.job.file" in loaded and {"boto3", "runner.checkpoint.s3"} & set(loaded) == set()


# --- watch, logs, cancel ---


def test_watch_names_what_it_waits_for_and_ends_with_the_runs_code(
    proxy: FaultProxy,
    port: int,
    job: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages: list[dict[str, Any]] = [
        {"status": "RUNNABLE", "statusReason": "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - no g5.xlarge"},
        {"status": "STARTING"},
        {"status": "RUNNING"},
        {"status": "RUNNABLE", "code": 75, "reason": "Host EC2 (instance i-1) terminated."},
        {"status": "RUNNING"},
        {"status": "FAILED", "code": 93, "reason": "Essential container in task exited"},
    ]
    looked = aws_batch.look

    def look(batch: Any, identity: str) -> Any:
        become(port, identity, **stages.pop(0))
        return looked(batch, identity)

    monkeypatch.setattr(aws_batch, "look", look)
    code, out, err = run(capsys, "submit", job, "--watch")
    assert (code, err) == (93, "")
    lines = [line.partition(": ")[2] for line in out.splitlines()[3:]]
    assert lines[0].startswith("RUNNABLE: CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY")
    assert lines[1].startswith("STARTING: ") and lines[2] == "runs, attempt 1"
    assert "attempt 1 ended: exit 75 Host EC2 (instance i-1) terminated." in lines[3]
    assert lines[4] == "runs, attempt 2"
    assert lines[5] == "failed after 2 attempts: exit 93: Essential container in task exited"


def test_logs(proxy: FaultProxy, port: int, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, identity = submitted(job, capsys)
    code, _, err = run(capsys, "logs", identity)
    assert code == 64 and f"{identity} has no log: RUNNABLE: waits for a machine" in err
    become(port, identity, status="RUNNING", log=["step 1", "step 2"])
    assert run(capsys, "logs", identity) == (0, "step 1\nstep 2\n", "")
    assert run(capsys, "logs", job) == (0, "step 1\nstep 2\n", "")
    become(port, identity, status="SUCCEEDED", code=0)
    assert run(capsys, "logs", job, "--follow") == (0, "step 1\nstep 2\n", "")
    code, _, err = run(capsys, "logs", "00000000-0000-0000-0000-000000000000")
    assert code == 64 and "Batch does not know this job" in err
    code, _, err = run(capsys, "logs", name, "--to", "aws-batch")
    assert code == 64 and "in which queue to look" in err


def test_cancel_and_describe(
    proxy: FaultProxy, port: int, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, identity = submitted(job, capsys)
    [line] = act.describe(resolved(job).job)
    assert line.startswith(f"{name} ({identity}) in queue spot: RUNNABLE: waits for a machine")
    code, out, _ = run(capsys, "cancel", job)
    assert code == 0 and f"{name} ({identity}): CancelJob" in out and _jobs(port) == []
    code, out, _ = run(capsys, "cancel", identity)
    assert code == 0 and "nothing of it is alive" in out
    _, identity = submitted(job, capsys)
    become(port, identity, status="RUNNING")
    code, out, _ = run(capsys, "cancel", identity)
    assert code == 0 and "TerminateJob" in out
    [line] = act.describe(resolved(job).job)
    assert "failed after 1 attempts: no exit code: runner cancel" in line


# --- docs/submit.md ---


def test_the_commands_of_the_docs_run(
    proxy: FaultProxy, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-job.yaml").write_text(documented("yaml")[0])
    client = _client("s3", f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="my-bucket")
    client.upload_file(str(tmp_path / "my-job.yaml"), "my-bucket", "jobs/my-job.yaml")
    monkeypatch.chdir(tmp_path)
    os.environ["JOB__AWS_BATCH"] = f"{{image: vlm-runner, queue: {QUEUE}}}"
    commands = documented_commands()
    assert len(commands) == 10
    for command in [one for one in commands if "aws-batch" in one or "validate" in one]:
        variable, _, rest = command.rpartition("runner ")
        name, _, value = variable.strip().partition("=")
        with monkeypatch.context() as patched:
            if name:
                patched.setenv(name, value)
            if rest.startswith("logs"):
                become(port, _jobs(port)[0]["jobId"], status="RUNNING", log=["step 1"])
            assert cli.main(rest.split()) == 0, command
