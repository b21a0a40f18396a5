"""Submissions of a run as Jobs of Kubernetes: to find them, to make one, to end one.

A run has many submissions, one after another: all carry its name in a label, each has a name of its own. A
submission is made whole or not at all: the server tries every object first, also a pod of the Job's template
(a Job whose pods are refused is accepted, and then waits for ever); the Job comes first, owns the rest, and
whatever goes wrong deletes it. Signals wait until that is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.cluster.kubectl import Kubectl
from runner.cluster.signals import signals_later
from runner.cluster.waiting import QUEUE, finished
from runner.errors import AccessDenied, JobError, NotOwner, Problem, RunnerError

Json = Mapping[str, Any]

RUN = "vlm-runner/run"
"""The label with the name of the run (`runner.targets`)."""

_KUEUE = "/apis/kueue.x-k8s.io"


def submissions(kubectl: Kubectl, run: str) -> list[Json]:
    """The Jobs of a run, newest first."""
    found = kubectl.get("jobs", labelSelector=f"{RUN}={run}")
    return sorted(found["items"], key=lambda job: job["metadata"]["creationTimestamp"], reverse=True)


def alive(jobs: Sequence[Json]) -> list[Json]:
    """Those that have not finished."""
    return [job for job in jobs if finished(job) is None]


def make(kubectl: Kubectl, run: str, documents: Sequence[Json], warn: Callable[[str], None]) -> Json:
    """Make the objects of a submission, all or none. Returns the Job.

    Args:
        documents: as `render` gives them: one Job, and what goes with it.

    Raises:
        NotOwner: another submission of the run is alive.
        RunnerError: the cluster refuses; nothing was made, or nothing stayed.
        KeyboardInterrupt: a signal came; nothing stayed.
    """
    [job] = [document for document in documents if document["kind"] == "Job"]
    if others := alive(submissions(kubectl, run)):
        raise _runs(kubectl, run, others[0])
    _try_queue(kubectl, job, warn)
    _try_pod(kubectl, job, warn)
    for document in documents:
        kubectl.create(document, dry_run=True)
    name = job["metadata"]["name"]
    with signals_later() as asked:
        try:
            made: Json = kubectl.create(job)
            owner = {
                "apiVersion": job["apiVersion"],
                "kind": job["kind"],
                "name": name,
                "uid": made["metadata"]["uid"],
            }
            for document in documents:
                asked()
                if document is not job:
                    metadata = {**document["metadata"], "ownerReferences": [owner]}
                    kubectl.create({**document, "metadata": metadata})
            asked()
        except BaseException:
            _unmake(kubectl, name, warn)
            raise
    return made


def _unmake(kubectl: Kubectl, name: str, warn: Callable[[str], None]) -> None:
    """Delete the Job, also one whose creation was not answered: nobody else has its name."""
    try:
        kubectl.delete("jobs", name)
    except RunnerError as error:
        warn(
            f"what was begun may be left in the cluster: {str(error).splitlines()[0]}\n"
            f"    remedy: kubectl delete job {name} --namespace {kubectl.where.namespace} "
            f"--context {kubectl.where.context} --ignore-not-found; the rest goes with it"
        )


def _runs(kubectl: Kubectl, run: str, job: Json) -> NotOwner:
    name = job["metadata"]["name"]
    state = "is being deleted" if job["metadata"].get("deletionTimestamp") else "is alive"
    return NotOwner(
        f"submit {run}: its submission {name} {state} in {kubectl.where}, and one run has one owner\n"
        f"    remedy: follow it (runner logs {name} --follow{kubectl.options}), or end it first "
        f"(runner cancel {name}{kubectl.options}); another run needs another name"
    )


def _try_queue(kubectl: Kubectl, job: Json, warn: Callable[[str], None]) -> None:
    """Kueue lets a Job of a queue that is not there wait without a word."""
    queue = job["metadata"].get("labels", {}).get(QUEUE)
    if queue is None:
        return
    path = f"namespaces/{kubectl.where.namespace}/localqueues/{queue}"
    try:
        if kueue := kubectl.get_path(_KUEUE, "ask for Kueue"):
            version = kueue["preferredVersion"]["groupVersion"]
            if kubectl.get_path(f"/apis/{version}/{path}", f"read LocalQueue {queue}") is not None:
                return
    except AccessDenied as error:
        warn(f"whether the queue exists is not known: {error}")
        return
    reason = f"{queue!r}: there is no such LocalQueue in {kubectl.where}"
    remedy = "name one of kubectl get localqueues"
    if not kueue:
        reason, remedy = (
            f"{queue!r}: {kubectl.where} has no Kueue",
            "remove kubernetes.queue, or install Kueue",
        )
    raise JobError([Problem("kubernetes.queue", reason, remedy)])


def _try_pod(kubectl: Kubectl, job: Json, warn: Callable[[str], None]) -> None:
    """Let the server judge a pod of the Job's template, as it would judge those of the Job controller."""
    template = job["spec"]["template"]
    metadata = {**template.get("metadata", {}), "name": job["metadata"]["name"]}
    if (namespace := job["metadata"].get("namespace")) is not None:
        metadata["namespace"] = namespace
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    try:
        kubectl.create(pod, dry_run=True)
    except AccessDenied as error:
        warn(f"whether the cluster takes the job's pods is not known: {error}")
