"""The pods of a job, for Job, JobSet and TrainJob: the base Job of `k8s/`, patched."""

from __future__ import annotations

from runner import __version__
from runner.manifest import Job
from runner.places import Kubernetes, Resources
from runner.section import seconds
from runner.targets.submission import Submission
from runner.targets.template import Tree, load, merge

BASE = "kubernetes/base/train.yaml"
GPU = "nvidia.com/gpu"
GRACE = "RUNNER_GRACE_SECONDS"
TRAINER = "trainer"
"""Name of the container."""


def kubernetes(job: Job) -> Kubernetes:
    """The job's section; its defaults where there is none, which `runner.targets.refusals` refuses."""
    return job.kubernetes or Kubernetes()


def patched(submission: Submission) -> Tree:
    """The base Job with all that the job says of its pods; its names and retry rules are the caller's."""
    job, place = submission.job, kubernetes(submission.job)
    base = load(BASE)
    if job.resources.spot and place.cloud is not None:
        base = merge(base, load(f"kubernetes/overlays/{place.cloud}-spot/patch.yaml"))
    spec, labels = base["spec"]["template"]["spec"], all_labels(submission)
    kueue = {"kueue.x-k8s.io/podset-preferred-topology": place.topology} if place.topology else {}
    patch: Tree = {
        "metadata": {"labels": {**labels, **queue_labels(job)}},
        "spec": {
            "ttlSecondsAfterFinished": int(seconds(place.keep_finished)),
            "template": {
                "metadata": {"labels": labels, "annotations": {**kueue, **place.annotations}},
                "spec": _spec(submission, spec),
            },
        },
    }
    if place.namespace is not None:
        patch["metadata"]["namespace"] = place.namespace
    return merge(base, patch)


def all_labels(submission: Submission) -> dict[str, str]:
    """Labels of every object, the user's included."""
    return {
        **kubernetes(submission.job).labels,
        **submission.labels,
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "vlm-runner",
    }


def queue_labels(job: Job) -> dict[str, str]:
    """What Kueue reads, of the object that it lets in."""
    place, limit = kubernetes(job), job.resources.time_limit
    labels = {}
    if place.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = place.queue
        if limit is not None:
            # Adds up over suspensions; a deadline begins again at each.
            labels["kueue.x-k8s.io/max-exec-time-seconds"] = str(int(seconds(limit)))
    if place.queue_priority is not None:
        labels["kueue.x-k8s.io/priority-class"] = place.queue_priority
    return labels


def deadline(job: Job) -> int | None:
    """activeDeadlineSeconds, where no queue counts the time."""
    limit = job.resources.time_limit
    return None if limit is None or kubernetes(job).queue is not None else int(seconds(limit))


def metadata(submission: Submission) -> Tree:
    """Name, namespace and labels of an object beside the Job."""
    place = kubernetes(submission.job)
    where = {} if place.namespace is None else {"namespace": place.namespace}
    return {"name": submission.name, **where, "labels": all_labels(submission)}


def config_map(submission: Submission) -> Tree:
    """The job file, which no one changes under a running pod."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(submission),
        "immutable": True,
        "data": {"job.yaml": submission.text},
    }


def owned_by_jobset(template: Tree) -> Tree:
    """A pod template whose run belongs to the JobSet: its Jobs and their uids are new after each restart."""
    (container,) = template["spec"]["containers"]
    uid = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}}
    variable = {"name": "RUNNER_JOB_UID", "valueFrom": uid}
    return merge(template, {"spec": {"containers": [{"name": container["name"], "env": [variable]}]}})


def _spec(submission: Submission, spec: Tree) -> Tree:
    """The patch of the pod's spec."""
    job, place = submission.job, kubernetes(submission.job)
    selector = dict(place.node_selector)
    if job.resources.gpu_type is not None:
        selector[place.gpu_type_label] = job.resources.gpu_type
    period, counted_on = _grace(job, spec)
    patch: Tree = {
        "terminationGracePeriodSeconds": period,
        "serviceAccountName": place.service_account,
        "tolerations": _tolerations(job, spec["tolerations"]),
        "containers": [_container(submission, counted_on)],
        "volumes": volumes(submission),
    }
    if selector:
        patch["nodeSelector"] = selector
    if place.priority_class is not None:
        patch["priorityClassName"] = place.priority_class
    if place.image_pull_secrets:
        patch["imagePullSecrets"] = [{"name": name} for name in place.image_pull_secrets]
    return patch


def grace(resources: Resources, place: Kubernetes, period: int, leaves: int) -> tuple[int, int | None]:
    """Seconds from SIGTERM to the kill, and those that the supervisor may count on; None: nobody knows.

    spot   cloud   termination_grace_seconds   notice_seconds   template   result
    no     any     null                        null             110, 110   110, 110
    no     any     60                          null             110, 110   60, 60
    yes    gke     null                        null             25, 15     25, 15
    yes    gke     60                          null             25, 15     60, 15
    yes    gke     null                        120              25, 15     120, 120
    yes    gke     60                          120              25, 15     60, 60
    yes    null    null                        null             110, 110   110, None
    yes    null    null                        30               110, 110   30, 30

    Args:
        period: the template's terminationGracePeriodSeconds.
        leaves: its RUNNER_GRACE_SECONDS, what its spot nodes leave a pod.
    """
    grace_period = place.termination_grace_seconds or place.notice_seconds or period
    if not resources.spot:
        return grace_period, grace_period
    if place.notice_seconds is not None:
        return grace_period, min(grace_period, place.notice_seconds)
    return grace_period, None if place.cloud is None else min(grace_period, leaves)


def _grace(job: Job, spec: Tree) -> tuple[int, int | None]:
    told = next(one["value"] for one in spec["containers"][0]["env"] if one["name"] == GRACE)
    return grace(job.resources, kubernetes(job), spec["terminationGracePeriodSeconds"], int(told))


def _tolerations(job: Job, base: list[Tree]) -> list[Tree]:
    kept = [one for one in base if one.get("key") != GPU or job.resources.gpu]
    more = [one.model_dump(exclude_none=True) for one in kubernetes(job).tolerations]
    return [*kept, *more]


def _container(submission: Submission, grace_seconds: int | None) -> Tree:
    job, place = submission.job, kubernetes(submission.job)
    amounts = requests(job.resources)
    mounts: list[Tree] = []
    variables = [{"name": name, "value": value} for name, value in place.env.items()]
    told = {"$patch": "delete"} if grace_seconds is None else {"value": str(grace_seconds)}
    variables.append({"name": GRACE, **told})
    if place.hf_token_from is None:
        variables.append({"name": "HF_TOKEN_PATH", "$patch": "delete"})
        mounts.append({"mountPath": "/etc/secrets/hf", "$patch": "delete"})
    patch: Tree = {
        "name": TRAINER,
        "image": place.image,
        "env": variables,
        "volumeMounts": mounts,
        "resources": {"requests": amounts, "limits": amounts},
    }
    if place.env_from:
        patch["envFrom"] = [{"secretRef": {"name": name}} for name in place.env_from]
    return patch


def requests(resources: Resources) -> Tree:
    """Requests, and limits, of a container; GPU null for none, which removes the template's."""
    return {
        "cpu": str(resources.cpu),
        "memory": resources.memory,
        "ephemeral-storage": resources.ephemeral_storage,
        GPU: str(resources.gpu) if resources.gpu else None,
    }


def volumes(submission: Submission) -> list[Tree]:
    """The volumes that depend on the job."""
    resources, token = submission.job.resources, kubernetes(submission.job).hf_token_from
    hf: Tree = {"name": "hf", "$patch": "delete"}
    if token is not None:
        name, _, key = token.partition("/")
        # A Secret that is named has to be there: else the pod waits and says so, instead of failing on a GPU.
        items = [{"key": key or "token", "path": "token"}]
        # False, not absent: a TrainJob's patch lies over the runtime's, which is optional.
        hf = {"name": "hf", "secret": {"secretName": name, "optional": False, "items": items}}
    return [
        {"name": "job", "configMap": {"name": submission.name}},
        hf,
        {"name": "scratch", "emptyDir": {"sizeLimit": resources.ephemeral_storage}},
        {"name": "shm", "emptyDir": {"sizeLimit": resources.shm}},
    ]
