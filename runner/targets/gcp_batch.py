"""A job as a job of Google Cloud Batch: what `gcloud batch jobs submit --config` reads."""

from __future__ import annotations

import shlex

from runner import exits
from runner.places import GcpBatch
from runner.section import seconds
from runner.targets.batch import caches, delivery, mebibytes
from runner.targets.submission import Submission
from runner.targets.template import Tree, load, merge

PREEMPTED = 50001
"""What Batch says instead of an exit code when it took the machine away."""


def objects(one: Submission) -> list[Tree]:
    """The job, alone in its list."""
    template, place = load("gcp-batch.json"), one.job.gcp_batch or GcpBatch()
    group: Tree = template["taskGroups"][0]
    labels = {**place.labels, **_labels(one)}
    job: Tree = {
        "taskGroups": [merge(group, {"taskSpec": _task(one, place, group["taskSpec"])})],
        "allocationPolicy": {
            **_machines(one, place, template["allocationPolicy"]["instances"][0]),
            "labels": labels,
        },
        "labels": labels,
    }
    return [merge(template, job)]


def command(one: Submission, file: str) -> str:
    """The gcloud line that submits what was rendered.

    Args:
        file: where it was put.
    """
    place = one.job.gcp_batch or GcpBatch()
    words = ["gcloud", "batch", "jobs", "submit", one.name, f"--location={place.region}", f"--config={file}"]
    words += [] if place.project is None else [f"--project={place.project}"]
    return shlex.join(words)


def retry_policy() -> list[Tree]:
    """lifecyclePolicies, by the table of `runner.exits`: one, which is all that Batch evaluates. It fails the
    task for the codes that it lists, and retries it for every other, `PREEMPTED` too."""
    return [{"action": "FAIL_TASK", "actionCondition": {"exitCodes": exits.codes("no")}}]


def _labels(one: Submission) -> dict[str, str]:
    # Google's labels have no slashes and no dots.
    return {"vlm-runner-run": one.job.name, "vlm-runner-submission": one.name}


def _task(one: Submission, place: GcpBatch, template: Tree) -> Tree:
    resources = one.job.resources
    variable, value = delivery(one)
    # One submission, one owner: its attempts are siblings.
    variables = {**caches(), "RUNNER_JOB_UID": one.name, variable: value, **place.env}
    environment: Tree = {"variables": variables}
    if place.secrets:
        environment["secretVariables"] = {secret.variable: secret.reference for secret in place.secrets}
    options = [
        "--user=10001:10001",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--tmpfs=/tmp:rw,mode=1777",
        f"--shm-size={mebibytes(resources.shm)}m",
        *(["--gpus=all"] if resources.gpu else []),
    ]
    runnable = merge(
        template["runnables"][0],
        {"container": {"imageUri": place.image, "options": " ".join(options)}},
    )
    make = {"script": {"text": "install --directory --owner=10001 --group=10001 /var/lib/vlm-runner"}}
    task: Tree = {
        "runnables": [make, runnable],
        "computeResource": {
            "cpuMilli": str(1000 * resources.cpu),
            "memoryMib": str(mebibytes(resources.memory)),
        },
        "environment": environment,
        "maxRetryCount": place.retries,
        "lifecyclePolicies": retry_policy(),
    }
    if resources.time_limit is not None:
        task["maxRunDuration"] = f"{int(seconds(resources.time_limit))}s"
    return task


def _machines(one: Submission, place: GcpBatch, template: Tree) -> Tree:
    resources = one.job.resources
    gigabytes = -(-mebibytes(resources.ephemeral_storage) // 1024)
    policy: Tree = {
        "machineType": place.machine_type,
        "provisioningModel": "SPOT" if resources.spot else "STANDARD",
        # Debian: the default for containers alone has no shell for the first runnable.
        "bootDisk": {"image": "batch-debian", "sizeGb": str(gigabytes)},
    }
    instance: Tree = {"policy": policy}
    if resources.gpu:
        instance["installGpuDrivers"] = True
        if resources.gpu_type is not None:
            policy["accelerators"] = [{"type": resources.gpu_type, "count": str(resources.gpu)}]
    machines: Tree = {"instances": [merge(template, instance)]}
    if place.locations:
        machines["location"] = {"allowedLocations": list(place.locations)}
    if place.service_account is not None:
        machines["serviceAccount"] = {"email": place.service_account}
    if place.network is not None or place.subnetwork is not None or not place.external_ip:
        interface = {
            "network": place.network,
            "subnetwork": place.subnetwork,
            "noExternalIpAddress": not place.external_ip,
        }
        machines["network"] = {
            "networkInterfaces": [{key: value for key, value in interface.items() if value is not None}]
        }
    return machines
