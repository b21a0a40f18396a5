"""What a Job of Kubernetes does now, in words: pure functions over what the API server says.

`state` is the one that the verbs use. What keeps a job pending is named as the cluster names it, with what a
person can do where the cluster's words do not say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any

Json = Mapping[str, Any]

INDEX = "batch.kubernetes.io/job-completion-index"
QUEUE = "kueue.x-k8s.io/queue-name"

OVERDUE = 60.0
"""Seconds after the end of its grace from which a pod that is still there counts as stuck."""


class Phase(Enum):
    """Of a submission."""

    PENDING = auto()
    RUNNING = auto()
    DONE = auto()
    FAILED = auto()
    GONE = auto()
    """Deleted by somebody."""


@dataclass(frozen=True)
class State:
    """What a submission does, and for FAILED the exit code of its run."""

    phase: Phase
    words: str
    code: int = 0


@dataclass(frozen=True)
class Seen:
    """What one look at a submission brought."""

    job: Json
    pods: Sequence[Json]
    """Oldest first."""
    events: Sequence[Json] = ()
    """About the pods that have not ended, or else the Job; oldest first."""
    workload: Json | None = None
    """Kueue's word for the Job."""


@dataclass(frozen=True)
class Ended:
    """How a pod's container ended."""

    code: int
    words: str
    at: str


def finished(job: Json) -> str | None:
    """`Complete` or `Failed`, None while a Job lives."""
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


def state(seen: Seen, now: datetime) -> State:
    """What a submission does now.

    Job        newest pod of each index            ->
    Complete   any                                 DONE
    Failed     any                                 FAILED, with the code of the pod that failed first
    suspended  any                                 PENDING: the queue, and what Kueue says of it
    else       one that waits or is stuck          PENDING: why (`_pod_waits`)
    else       none, or all ended                  PENDING: what stops the Job controller, or its pause
    else       all run                             RUNNING
    """
    newest = _newest(seen.pods)
    match finished(seen.job):
        case "Complete":
            return State(Phase.DONE, "done")
        case "Failed":
            return _failed(seen.job, newest)
    if seen.job["spec"].get("suspend"):
        return State(Phase.PENDING, _suspended(seen))
    for pod in newest:
        if why := _pod_waits(pod, seen.events, now):
            return State(Phase.PENDING, f"pod {pod['metadata']['name']}: {why}")
    alive = [pod for pod in newest if not over(pod)]
    if not alive:
        return State(Phase.PENDING, _no_pod(seen, newest))
    return State(
        Phase.RUNNING,
        "runs: "
        + ", ".join(f"{pod['metadata']['name']} on {pod['spec'].get('nodeName', '?')}" for pod in alive),
    )


def over(pod: Json) -> bool:
    """Whether nothing of a pod runs any more, and nothing will. A node that is deleted or that refuses or
    evicts a pod leaves no end of the container, only the pod's phase."""
    return ended(pod) is not None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def ended(pod: Json) -> Ended | None:
    """How the trainer's container ended: by its last words if it left some, else by its code alone."""
    for status in pod.get("status", {}).get("containerStatuses", ()):
        end = status["state"].get("terminated")
        if status["name"] != pod["spec"]["containers"][0]["name"] or end is None:
            continue
        code, text = end["exitCode"], end.get("message", "")
        words = _last_words(text)
        why = words.get("message") or (text.strip().splitlines() or [end.get("reason", "")])[-1]
        kept = f", step {words['step']}" if words.get("step") is not None else ""
        return Ended(code, f"exit {code}{kept}: {why}".rstrip(": "), end.get("finishedAt") or "")
    return None


def _last_words(text: str) -> Json:
    """The JSON that a supervisor leaves (RUNNER_TERMINATION_LOG); empty where the text is a log's end."""
    try:
        words = json.loads(text)
    except ValueError:
        return {}
    return words if isinstance(words, dict) else {}


def _newest(pods: Sequence[Json]) -> list[Json]:
    """The newest pod of each index, by index."""
    by_index = {pod["metadata"].get("annotations", {}).get(INDEX, "0"): pod for pod in pods}
    return [by_index[index] for index in sorted(by_index, key=int)]


def _failed(job: Json, newest: Sequence[Json]) -> State:
    ends = [end for pod in newest if (end := ended(pod)) is not None and end.code]
    first = min(ends, key=lambda end: end.at, default=None)
    condition = next(one for one in job["status"]["conditions"] if one["type"] == "Failed")
    why = " ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    said = f"failed: {first.words if first else 'no pod is left to say why'}{f' ({why})' if why else ''}"
    return State(Phase.FAILED, said, first.code if first else 1)


def _suspended(seen: Seen) -> str:
    queue = seen.job["metadata"].get("labels", {}).get(QUEUE)
    if queue is None:
        return "suspended: kubectl patch job ... suspend=false, or whoever suspended it, lets it go on"
    conditions = (seen.workload or {}).get("status", {}).get("conditions", ())
    why = next((one["message"] for one in conditions if one["status"] == "False" and one.get("message")), "")
    return f"waits in queue {queue}{f': {why}' if why else ''}"


def _pod_waits(pod: Json, events: Sequence[Json], now: datetime) -> str | None:
    """Why a pod does not run; None when it runs or has ended.

    deleted for longer than its grace        its node does not answer, and there will be no other pod
    PodScheduled is False                    the scheduler's message, or the gates that hold it
    container waits: image                   the image, and the registry's answer
    container waits: configuration           what is missing
    container waits: anything else           the newest event (no such volume, the pull that is on)
    """
    if deleted := pod["metadata"].get("deletionTimestamp"):
        late = (now - datetime.fromisoformat(deleted)).total_seconds()
        if late > OVERDUE:
            name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "?")
            return (
                f"its end is {late / 60:.0f} min overdue: node {node} does not answer, and no other pod "
                f"starts before it is fenced (kubectl delete node {node}; or, when the machine is surely "
                f"off, kubectl delete pod {name} --force)"
            )
    status = pod.get("status", {})
    if over(pod):
        return None
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            what = "no node takes it" if condition.get("reason") == "Unschedulable" else "not scheduled"
            return f"{what}: {condition.get('message') or condition.get('reason')}"
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    for container in containers:
        if (waiting := container["state"].get("waiting")) is not None:
            return _container_waits(container, waiting, _newest_event(pod, events))
    if status.get("phase") == "Pending" and not containers:
        return _newest_event(pod, events) or "on its way to a node"
    return None


def _container_waits(container: Json, waiting: Json, event: str) -> str:
    reason, message = waiting.get("reason", ""), waiting.get("message") or event
    if "Image" in reason or reason == "RegistryUnavailable":
        return f"the image {container['image']} cannot be pulled ({reason}): {message}".rstrip(": ")
    if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        return f"the container cannot be made ({reason}): {message}".rstrip(": ")
    return f"{reason}: {message}".rstrip(": ")


def _no_pod(seen: Seen, newest: Sequence[Json]) -> str:
    if refused := next((e for e in reversed(seen.events) if e["reason"] == "FailedCreate"), None):
        return f"its pods are refused: {refused['message']}"
    ends = [end for pod in newest if (end := ended(pod)) is not None]
    if lost := [pod for pod in newest if ended(pod) is None and over(pod)]:
        return f"waits for its next pod after {_lost(lost[-1])} {_PAUSE}"
    if not ends:
        return _newest_event(seen.job, seen.events) or "no pod yet"
    if not any(end.code for end in ends):
        return "its pods are done, and about to be counted"
    return f"waits for its next pod after {max(ends, key=lambda end: end.at).words} {_PAUSE}"


_PAUSE = "(the pause doubles with every end, up to 6 min)"


def _lost(pod: Json) -> str:
    """The end of a pod whose container left none: evicted, refused by its node, or gone with it."""
    status = pod["status"]
    disrupted: Json = next(
        (
            one
            for one in status.get("conditions", ())
            if one["type"] == "DisruptionTarget" and one["status"] == "True"
        ),
        {},
    )
    reason = status.get("reason") or disrupted.get("reason") or status["phase"]
    message = status.get("message") or disrupted.get("message") or ""
    return f"{pod['metadata']['name']}: {reason}: {message}".rstrip(": ")


def _newest_event(document: Json, events: Sequence[Json]) -> str:
    uid = document["metadata"]["uid"]
    about = [event for event in events if event["involvedObject"].get("uid") == uid]
    return f"{about[-1]['reason']}: {about[-1]['message']}" if about else ""
