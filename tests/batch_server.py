"""AWS Batch, CloudWatch's logs and S3 on one real server (moto, a process), where a test directs jobs.

    with batch_server() as port: ...
    become(port, identity, status="RUNNING")
    become(port, identity, status="FAILED", code=78, reason="Essential container in task exited")

moto's Batch runs containers by docker, or in its simple mode marks each job as done. Here a job is RUNNABLE
until the test says what has become of it, or somebody ends it.

    python -m tests.batch_server PORT
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Iterable, Iterator
from http.client import HTTPConnection
from typing import Any

from tests.s3_server import s3_server, serve

CONTROL = "/control/"
QUEUE = "spot"
LOG_GROUP = "/aws/batch/job"


@contextlib.contextmanager
def batch_server() -> Iterator[int]:
    """Run the server, with an empty bucket; yields its port."""
    with s3_server(module=__name__) as port:
        yield port


def with_queue(client: Any, iam: Any) -> None:
    """Make the queue `spot`."""
    role = iam.create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    client.create_compute_environment(
        computeEnvironmentName="spot", type="UNMANAGED", state="ENABLED", serviceRole=role
    )
    order = [{"order": 1, "computeEnvironment": "spot"}]
    client.create_job_queue(jobQueueName=QUEUE, state="ENABLED", priority=1, computeEnvironmentOrder=order)


def become(port: int, identity: str, **what: Any) -> None:
    """Say what a job does: status; statusReason; of its container code and reason; log, a list of lines."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"{CONTROL}{identity}", json.dumps(what))
    assert connection.getresponse().status == 200
    connection.close()


def _became(job: Any, what: dict[str, Any]) -> None:
    job.status = what["status"]
    job.job_stopped_reason = what.get("statusReason")
    if job.status == "RUNNING":
        job.job_started_at = datetime.datetime.now()
        job.log_stream_name = f"{job._stream_name}/{len(job.attempts)}"
        job._start_attempt()
    if "log" in what:
        logs = job._log_backend
        logs.ensure_log_group(LOG_GROUP)
        with contextlib.suppress(Exception):  # it is there already
            logs.create_log_stream(LOG_GROUP, job.log_stream_name)
        now = int(datetime.datetime.now().timestamp() * 1000)
        events = [{"timestamp": now + number, "message": line} for number, line in enumerate(what["log"])]
        logs.put_log_events(LOG_GROUP, job.log_stream_name, events)
    if "code" in what:
        job.latest_attempt["container"] |= {"exitCode": what["code"], "reason": what.get("reason", "")}
        job._stop_attempt()
    if job.status in ("SUCCEEDED", "FAILED"):
        job.job_stopped, job.job_stopped_at = True, datetime.datetime.now()


def _scripted() -> None:
    """Jobs do nothing by themselves."""
    from moto.batch.models import Job
    from moto.batch_simple.models import BatchSimpleBackend
    from moto.core.config import default_user_config

    def begun(backend: Any, include_start_attempt: bool, job: Any) -> None:
        backend.backend._jobs[job.job_id] = job
        job.status = "RUNNABLE"

    def terminate(job: Any, reason: str) -> None:
        _became(job, {"status": "FAILED", "statusReason": reason})

    default_user_config["batch"] = {"use_docker": False}
    BatchSimpleBackend._mark_job_as_finished = begun
    Job.terminate = terminate


def controlled(moto: Any) -> Any:
    """The same WSGI application, that also hears what becomes of jobs."""
    from moto.batch.models import batch_backends

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not environ["PATH_INFO"].startswith(CONTROL):
            return moto(environ, start_response)
        what = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        identity = environ["PATH_INFO"].removeprefix(CONTROL)
        backends = batch_backends["123456789012"].values()
        [job] = [backend._jobs[identity] for backend in backends if identity in backend._jobs]
        _became(job, what)
        start_response("200 OK", [("Content-Length", "0")])
        return [b""]

    return application


if __name__ == "__main__":
    _scripted()
    serve(int(sys.argv[1]), float(sys.argv[2]), controlled)
