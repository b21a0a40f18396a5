"""Submissions of a run on AWS Batch: to make one, follow it, read its log, end it.

A definition and a job are made whole or not at all, as on Kubernetes (`runner.cluster.jobs`). A job file that
is too large for Batch's limits goes to the store first, to the address that the rendered JOB_FILE has. Batch
starts a job again by itself; a submission is alive until Batch gives up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runner.checkpoint.place import open_store
from runner.checkpoint.store import BootClock, Patience, Store
from runner.cluster.batch import ALIVE, Batch
from runner.cluster.signals import signals_later
from runner.cluster.waiting import Phase, State
from runner.errors import NotOwner, RunnerError, StorageError, UsageError
from runner.manifest import Checkpoints

PAUSE = 10.0
"""Seconds between two looks."""

PATIENCE = 300.0
"""Seconds that a silent service is waited for while a job is followed."""

STORE_PATIENCE = 30.0
"""The same of the store, while a signal waits for a submission to be whole."""

_IDENTITY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Json = Mapping[str, Any]
Say = Callable[[str], None]


def is_identity(word: str) -> bool:
    """Whether a word is a job id of Batch."""
    return _IDENTITY.fullmatch(word) is not None


def submissions(batch: Batch, queue: str, run: str) -> list[Json]:
    """The jobs of a run that Batch remembers, newest first: `<run>-<5 characters>`."""
    own = re.compile(re.escape(run) + r"-[a-z0-9]{5}")
    return [job for job in batch.jobs(queue, f"{run}-") if own.fullmatch(job["jobName"])]


def alive(jobs: Sequence[Json]) -> list[Json]:
    """Those that Batch has not given up or finished."""
    return [job for job in jobs if job["status"] in ALIVE]


def make(batch: Batch, run: str, documents: Sequence[Json], text: str, store: Checkpoints, warn: Say) -> str:
    """Register and submit, or leave nothing. Returns the job's id.

    Args:
        documents: as `render` gives them: {"RegisterJobDefinition": fields}, {"SubmitJob": fields}.
        text: the job, for the store, if the documents read it from there.
        store: of the job.

    Raises:
        NotOwner: another submission of the run is alive.
        RunnerError: Batch or the store refuses; nothing stayed.
        KeyboardInterrupt: a signal came; nothing stayed.
    """
    definition, submit = documents[0]["RegisterJobDefinition"], documents[1]["SubmitJob"]
    queue, name = submit["jobQueue"], submit["jobName"]
    if others := alive(submissions(batch, queue, run)):
        raise _runs(run, queue, others[0])
    kept = _revisions(batch, definition["jobDefinitionName"])
    with signals_later() as asked:
        undo: list[Callable[[], object]] = []
        try:
            if (address := job_file(documents)) is not None:
                undo.append(lambda: _delete(address, store))
                _put(address, text, store)
            asked()
            undo.append(lambda: _deregister(batch, definition["jobDefinitionName"], kept))
            registered = batch.call("RegisterJobDefinition", **definition)
            # Its own revision: another submission of the run may register one at the same time.
            exact = f"{registered['jobDefinitionName']}:{registered['revision']}"
            undo[-1] = lambda: batch.call("DeregisterJobDefinition", jobDefinition=exact)
            asked()
            undo.append(lambda: _end(batch, queue, name))
            answer = batch.call("SubmitJob", **{**submit, "jobDefinition": exact})
            asked()
        except BaseException:
            for step in reversed(undo):
                _undo(step, name, warn)
            raise
    return str(answer["jobId"])


def job_file(documents: Sequence[Json]) -> str | None:
    """The address of the job in the store, as JOB_FILE has it; None when it comes another way."""
    properties = documents[0]["RegisterJobDefinition"]["containerProperties"]
    overrides = documents[1]["SubmitJob"].get("containerOverrides", {})
    for variable in [*overrides.get("environment", ()), *properties.get("environment", ())]:
        if variable["name"] == "JOB_FILE" and variable["value"].startswith("s3://"):
            return str(variable["value"])
    return None


def _put(address: str, text: str, store: Checkpoints) -> None:
    """Write the job, once: its address has the submission's own name."""
    folder, _, key = address.rpartition("/")
    place = _opened(folder, store)
    try:
        if not place.create(key, text.encode()):
            raise StorageError(
                f"put the job to {address}: it holds another\n    remedy: give the same command again"
            )
    finally:
        place.close()


def _delete(address: str, store: Checkpoints) -> None:
    folder, _, key = address.rpartition("/")
    place = _opened(folder, store)
    try:
        place.delete(key)
    finally:
        place.close()


def _opened(folder: str, store: Checkpoints) -> Store:
    return open_store(
        folder,
        Patience(STORE_PATIENCE, BootClock(), lambda event: None),
        fenced=not store.allow_unfenced,
        kms_key=store.kms_key_id,
        bucket_owner=store.expected_bucket_owner,
    )


def _revisions(batch: Batch, name: str) -> set[str]:
    """The definitions of this name that are active."""
    found: set[str] = set()
    token: dict[str, str] = {}
    while True:
        page = batch.call("DescribeJobDefinitions", jobDefinitionName=name, status="ACTIVE", **token)
        found.update(one["jobDefinitionArn"] for one in page["jobDefinitions"])
        if not page.get("nextToken"):
            return found
        token = {"nextToken": page["nextToken"]}


def _deregister(batch: Batch, name: str, kept: set[str]) -> None:
    """Take back a registration that was not answered."""
    for arn in _revisions(batch, name) - kept:
        batch.call("DeregisterJobDefinition", jobDefinition=arn)


def _end(batch: Batch, queue: str, name: str) -> None:
    """End the jobs of this name, also one whose submission was not answered."""
    for job in alive([job for job in batch.jobs(queue, name) if job["jobName"] == name]):
        batch.call("TerminateJob", jobId=job["jobId"], reason="its submission failed")


def _undo(step: Callable[[], object], name: str, warn: Say) -> None:
    try:
        step()
    except RunnerError as error:
        warn(
            f"what was begun may be left: {error}\n"
            f"    remedy: look for {name} among jobs, job definitions and the store"
        )


def _runs(run: str, queue: str, job: Json) -> NotOwner:
    return NotOwner(
        f"submit {run}: its submission {job['jobName']} ({job['jobId']}) is {job['status']} in queue "
        f"{queue}, and one run has one owner\n    remedy: follow it (runner logs JOB --follow), or end it first "
        "(runner cancel JOB); another run needs another name"
    )


def look(batch: Batch, identity: str) -> State:
    """What a job does now."""
    job = batch.job(identity)
    return State(Phase.GONE, "Batch does not know it any more") if job is None else state(job)


def state(job: Json) -> State:
    """What a job does, from its description.

    status                            ->
    SUCCEEDED                         DONE
    FAILED                            FAILED, with the code of the last attempt
    RUNNING                           RUNNING
    any other, attempts               PENDING: after which end
    any other                         PENDING: what Batch says of it
    """
    attempts = [one.get("container", {}) for one in job.get("attempts", ())]
    ends = [one for one in attempts if one.get("exitCode") is not None or one.get("reason")]
    reason = job.get("statusReason", "")
    match job["status"]:
        case "SUCCEEDED":
            return State(Phase.DONE, "done")
        case "FAILED":
            container = job.get("container", {})
            last = container if container.get("exitCode") is not None else ends[-1] if ends else {}
            code = last.get("exitCode")
            why = ", ".join(filter(None, (last.get("reason"), reason)))
            said = "no exit code" if code is None else f"exit {code}"
            return State(
                Phase.FAILED, f"failed after {len(attempts)} attempts: {said}: {why}".rstrip(": "), code or 1
            )
        case "RUNNING":
            return State(Phase.RUNNING, f"runs, attempt {max(len(attempts), 1)}")
    words = f"{job['status']}: {reason or _USUAL.get(job['status'], '')}".rstrip(": ")
    if ends:
        last = ends[-1]
        words += f" (attempt {len(attempts)} ended: exit {last.get('exitCode')} {last.get('reason', '')})"
    return State(Phase.PENDING, words)


_USUAL = {
    "RUNNABLE": "waits for a machine; if for long, ask for less in resources, or see the limits and "
    "instance types of the compute environment",
    "STARTING": "a machine is there; the image is pulled",
}


def follow(batch: Batch, identity: str, say: Say) -> int:
    """Say what a job does until it has ended. Returns the exit code of its run."""
    last, silent = "", 0.0
    while True:
        try:
            now = look(batch, identity)
            silent = 0.0
        except StorageError as error:
            if silent >= PATIENCE:
                raise StorageError(f"{error}; the job itself goes on") from error
            silent += PAUSE
            now = State(Phase.PENDING, f"Batch does not answer: {str(error).splitlines()[0]}")
        if now.words != last:
            say(f"{identity}: {now.words}")
            last = now.words
        match now.phase:
            case Phase.DONE:
                return 0
            case Phase.FAILED:
                return now.code
            case Phase.GONE:
                return RunnerError.exit_code
        time.sleep(PAUSE)


def logs(batch: Batch, identity: str, again: bool) -> Iterator[str]:
    """The log of a job's newest attempt; `again`: as it is written, and of later attempts, until its end.

    Raises:
        UsageError: there is no such job, or no log yet.
    """
    stream, token = "", None
    while True:
        job = known(batch, identity)
        now = job.get("container", {}).get("logStreamName")
        if now is None and not again:
            raise UsageError(f"{identity} has no log: {state(job).words}\n    remedy: --follow waits for one")
        if now != stream:
            stream, token = now, None
        while True:
            lines, after = batch.lines(job, token)
            yield from lines
            if after == token:  # CloudWatch gives the same token at the end
                break
            token = after
        if not again or job["status"] not in ALIVE:
            return
        time.sleep(PAUSE)


def cancel(batch: Batch, found: Sequence[Json], name: str, say: Say) -> None:
    """End what is alive: cancelled where it waits, terminated where it runs (SIGTERM, 30 s, SIGKILL)."""
    living = alive(found)
    for job in living:
        operation = "TerminateJob" if job["status"] in ("STARTING", "RUNNING") else "CancelJob"
        batch.call(operation, jobId=job["jobId"], reason="runner cancel")
        say(
            f"{job['jobName']} ({job['jobId']}): {operation}; what is committed stays, and submit goes on "
            "from there"
        )
    if not living:
        say(f"{name}: nothing of it is alive")


def known(batch: Batch, identity: str) -> Json:
    """All about a job.

    Raises:
        UsageError: Batch does not know it.
    """
    job = batch.job(identity)
    if job is None:
        raise UsageError(
            f"{identity}: Batch does not know this job\n"
            "    remedy: see the region (AWS_REGION); Batch forgets a job a week after its end"
        )
    return job


def newest(batch: Batch, queue: str, run: str) -> Json:
    """The newest job of a run.

    Raises:
        UsageError: Batch remembers none.
    """
    found = submissions(batch, queue, run)
    if not found:
        raise UsageError(
            f"{run}: queue {queue} has no job of this run\n"
            "    remedy: submit it; Batch forgets jobs a week after their end"
        )
    return (alive(found) or found)[0]


def describe(batch: Batch, queue: str, run: str) -> list[str]:
    """A line for the newest job of a run, if any."""
    found = submissions(batch, queue, run)
    return [
        f"{job['jobName']} ({job['jobId']}) in queue {queue}: {look(batch, job['jobId']).words}"
        for job in (alive(found) or found)[:1]
    ]
