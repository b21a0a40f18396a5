"""A run on a cluster: look at it, read its log, end it. `look` asks, `runner.cluster.waiting` judges."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from runner.cluster.jobs import alive, submissions
from runner.cluster.kubectl import Kubectl
from runner.cluster.waiting import INDEX, Phase, Seen, State, finished, over, state
from runner.errors import AccessDenied, UsageError

PAUSE = 5.0
"""Seconds between two looks."""

JOB_NAME = "batch.kubernetes.io/job-name"
_KUEUE = "/apis/kueue.x-k8s.io"

Json = Mapping[str, Any]
Say = Callable[[str], None]


def look(kubectl: Kubectl, name: str) -> State:
    """What a submission does now."""
    job = kubectl.get("jobs", name)
    if job is None:
        return State(Phase.GONE, "deleted")
    pods = _pods(kubectl, name)
    seen = Seen(job, pods)
    now = datetime.now(UTC)
    judged = state(seen, now)
    if judged.phase is not Phase.PENDING:
        return judged
    about = [pod for pod in pods if not over(pod)] or [job]
    events = [event for document in about for event in _events(kubectl, document)]
    return state(Seen(job, pods, events, _workload(kubectl, job)), now)


def named(kubectl: Kubectl, name: str) -> list[Json]:
    """The submissions of a run, newest first, or the one submission that has this name.

    Raises:
        UsageError: there is neither.
    """
    if found := submissions(kubectl, name):
        return found
    job = kubectl.get("jobs", name)
    if job is None:
        raise UsageError(
            f"{name}: there is no run and no submission of this name in {kubectl.where}\n"
            "    remedy: name the job file, or one of kubectl get jobs "
            "--selector app.kubernetes.io/managed-by=vlm-runner"
        )
    return [job]


def logs(kubectl: Kubectl, name: str, again: bool) -> Iterator[str]:
    """The log of the newest pod of a run or a submission, of its first node; `again`: as it is written, and
    of the pods that come after it, until the job has ended."""
    job = named(kubectl, name)[0]["metadata"]["name"]
    read: set[str] = set()
    while True:
        first = [
            pod
            for pod in _pods(kubectl, job)
            if pod["metadata"].get("annotations", {}).get(INDEX, "0") == "0"
            and pod["metadata"]["uid"] not in read
            and _has_log(pod)
        ]
        if first:
            read.update(pod["metadata"]["uid"] for pod in first)
            container = first[-1]["spec"]["containers"][0]["name"]
            yield from kubectl.lines(first[-1]["metadata"]["name"], container, again)
        elif not again:
            raise UsageError(
                f"{job} has no log: {look(kubectl, job).words}\n    remedy: --follow waits for one"
            )
        if not again:
            return
        newest = kubectl.get("jobs", job)
        if newest is None or (finished(newest) is not None and not first):
            return
        if not first:
            time.sleep(PAUSE)


def cancel(kubectl: Kubectl, name: str, say: Say) -> None:
    """End what is alive of a run, or a submission: its pods get SIGTERM, save and commit."""
    found = named(kubectl, name)
    living = alive(found)
    for job in living:
        kubectl.delete("jobs", job["metadata"]["name"], job["metadata"]["uid"])
        say(
            f"{job['metadata']['name']}: deleted; its pods have their grace to save and commit, and submit "
            "goes on from there"
        )
    if not living:
        say(f"{name}: nothing of it is alive in {kubectl.where}")


def describe(kubectl: Kubectl, run: str) -> list[str]:
    """A line for each submission that is alive, and for the newest when none is: what it does, and why it
    waits."""
    found = submissions(kubectl, run)
    shown = alive(found) or found[:1]
    names = [job["metadata"]["name"] for job in shown]
    return [f"{name} in {kubectl.where}: {look(kubectl, name).words}" for name in names]


def _pods(kubectl: Kubectl, name: str) -> list[Json]:
    """Oldest first."""
    found = kubectl.get("pods", labelSelector=f"{JOB_NAME}={name}")
    return sorted(found["items"], key=lambda pod: pod["metadata"]["creationTimestamp"])


def _has_log(pod: Json) -> bool:
    states = pod.get("status", {}).get("containerStatuses", ())
    return any("waiting" not in one["state"] for one in states)


def _events(kubectl: Kubectl, document: Json) -> Sequence[Json]:
    """Oldest first; none where they may not be read."""
    try:
        found = kubectl.get("events", fieldSelector=f"involvedObject.uid={document['metadata']['uid']}")
    except AccessDenied:
        return ()
    return sorted(found["items"], key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "")


def _workload(kubectl: Kubectl, job: Json) -> Json | None:
    """Kueue's object for a suspended Job, None where there is none to read."""
    if not job["spec"].get("suspend"):
        return None
    try:
        kueue = kubectl.get_path(_KUEUE, "ask for Kueue")
        if kueue is None:
            return None
        path = (
            f"/apis/{kueue['preferredVersion']['groupVersion']}/namespaces/{kubectl.where.namespace}/workloads"
            f"?labelSelector=kueue.x-k8s.io%2Fjob-uid%3D{job['metadata']['uid']}"
        )
        found = kubectl.get_path(path, "read the Workload")
    except AccessDenied:
        return None
    return found["items"][0] if found and found["items"] else None
