"""The seam to AWS Batch: one client, few requests, and what its refusals mean.

Requests are not repeated: a second SubmitJob would be a second job. boto3 is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner import aws
from runner.errors import AccessDenied, JobError, Problem, RunnerError, StorageError

Json = Mapping[str, Any]

ALIVE = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")

LOG_GROUP = "/aws/batch/job"
"""Where Batch puts a job's log that does not say."""

_METHODS = {
    "RegisterJobDefinition": "register_job_definition",
    "DeregisterJobDefinition": "deregister_job_definition",
    "DescribeJobDefinitions": "describe_job_definitions",
    "SubmitJob": "submit_job",
    "ListJobs": "list_jobs",
    "DescribeJobs": "describe_jobs",
    "CancelJob": "cancel_job",
    "TerminateJob": "terminate_job",
    "GetLogEvents": "get_log_events",
}


class Batch:
    """Batch, and the logs of its jobs, in one region.

    Args:
        region: None: as boto3 finds it.
    """

    def __init__(self, region: str | None) -> None:
        self._region = region
        self._clients: dict[str, Any] = {}

    def call(self, operation: str, **fields: Any) -> Any:
        """The answer to one request.

        Raises:
            RunnerError: as `refusal` says.
        """
        from botocore.exceptions import BotoCoreError, ClientError, NoRegionError, ParamValidationError

        try:
            return getattr(self._client(_service(operation)), _METHODS[operation])(**fields)
        except ClientError as error:
            raise refusal(operation, error.response) from error
        except (NoRegionError, ValueError) as error:
            raise JobError(
                [Problem("aws_batch.region", str(error), "name a region, or set AWS_REGION")]
            ) from error
        except ParamValidationError as error:
            raise JobError(
                [Problem("aws_batch", f"{operation}: {error}", "correct what it names")]
            ) from error
        except BotoCoreError as error:
            if (denied := aws.unusable(error, operation)) is not None:
                raise denied from error
            raise _silent(operation, str(error)) from error
        except OSError as error:
            raise AccessDenied(
                f"{operation}: no usable credentials: {error.filename}: {error.strerror}\n"
                "    remedy: correct the file that AWS_* or ~/.aws names"
            ) from error

    def jobs(self, queue: str, begins: str) -> list[Json]:
        """Summaries of the jobs of a queue whose names begin so, newest first."""
        found: list[Json] = []
        token: dict[str, str] = {}
        while True:
            page = self.call(
                "ListJobs", jobQueue=queue, filters=[{"name": "JOB_NAME", "values": [f"{begins}*"]}], **token
            )
            found += page["jobSummaryList"]
            if not page.get("nextToken"):
                return sorted(found, key=lambda job: job["createdAt"], reverse=True)
            token = {"nextToken": page["nextToken"]}

    def job(self, identity: str) -> Json | None:
        """All about a job, None when Batch does not know it (any more)."""
        jobs = self.call("DescribeJobs", jobs=[identity])["jobs"]
        return jobs[0] if jobs else None

    def lines(self, job: Json, token: str | None) -> tuple[list[str], str | None]:
        """The log of a job's newest attempt from a token on, and the token of what comes next."""
        container = job.get("container", {})
        options = container.get("logConfiguration", {}).get("options", {})
        stream = container.get("logStreamName")
        if stream is None:
            return [], token
        page = self.call(
            "GetLogEvents",
            logGroupName=options.get("awslogs-group", LOG_GROUP),
            logStreamName=stream,
            startFromHead=True,
            **({} if token is None else {"nextToken": token}),
        )
        return [event["message"] for event in page["events"]], page["nextForwardToken"]

    def close(self) -> None:
        """Give connections back."""
        for client in self._clients.values():
            client.close()

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = aws.client(service, self._region)
        return self._clients[service]


def refusal(operation: str, answer: Any) -> RunnerError:
    """The error for an answer that is none.

    code                                         ->
    AccessDenied..., Unrecognized..., Expired... 77
    ClientException, ValidationException, ...    78: what the request names is not there, or not allowed
    ResourceNotFoundException                    78
    any other, 5xx and throttling                74
    """
    error = answer.get("Error", {})
    code, message = str(error.get("Code", "?")), error.get("Message", "no reason given")
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{operation}: {code} ({status}): {message}"
    if (
        status in (401, 403)
        or "AccessDenied" in code
        or "Token" in code
        or code == "UnrecognizedClientException"
    ):
        return AccessDenied(f"{said}\n    remedy: log in again, or grant {_service(operation)}:{operation}")
    if status == 429 or status >= 500 or "Throttl" in code or code == "TooManyRequestsException":
        return _silent(operation, said.removeprefix(f"{operation}: "))
    return JobError([Problem("aws_batch", said, _remedy(message))])


def _service(operation: str) -> str:
    return "logs" if operation == "GetLogEvents" else "batch"


def _remedy(message: str) -> str:
    if "queue" in message.lower():
        return "correct aws_batch.queue: aws batch describe-job-queues lists them"
    return "correct what it names in the aws_batch section"


def _silent(operation: str, why: str) -> StorageError:
    return StorageError(
        f"{operation}: {why}\n    remedy: check the network and the region, then give the same command again"
    )
