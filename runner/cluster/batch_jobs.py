"""Submissions of a run on AWS Batch: to find them, and to make one.

A definition and a job are made whole or not at all, as on Kubernetes (`runner.cluster.jobs`). A job file that
is too large for Batch's limits goes to the store first, to the address that the rendered JOB_FILE has. Batch
starts a job again by itself; a submission is alive until Batch gives up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.checkpoint.place import open_store
from runner.checkpoint.store import BootClock, Patience, Store
from runner.cluster.batch import ALIVE, Batch
from runner.cluster.signals import signals_later
from runner.errors import NotOwner, RunnerError, StorageError
from runner.manifest import Checkpoints

STORE_PATIENCE = 30.0
"""Seconds that a silent store is waited for, while a signal waits for a submission to be whole."""

Json = Mapping[str, Any]


def submissions(batch: Batch, queue: str, run: str) -> list[Json]:
    """The jobs of a run that Batch remembers, newest first: `<run>-<5 characters>`."""
    own = re.compile(re.escape(run) + r"-[a-z0-9]{5}")
    return [job for job in batch.jobs(queue, f"{run}-") if own.fullmatch(job["jobName"])]


def alive(jobs: Sequence[Json]) -> list[Json]:
    """Those that Batch has not given up or finished."""
    return [job for job in jobs if job["status"] in ALIVE]


def make(
    batch: Batch,
    run: str,
    documents: Sequence[Json],
    text: str,
    store: Checkpoints,
    warn: Callable[[str], None],
) -> str:
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


def _undo(step: Callable[[], object], name: str, warn: Callable[[str], None]) -> None:
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
        f"{queue}, and one run has one owner\n    remedy: follow it (runner logs JOB --follow), or end it "
        "first (runner cancel JOB); another run needs another name"
    )
