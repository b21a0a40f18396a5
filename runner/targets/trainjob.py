"""A job as a TrainJob of Kubeflow Trainer, and the runtime that it refers to: the same for every job."""

from __future__ import annotations

from runner.targets.pods import (
    BASE,
    GRACE,
    config_map,
    deadline,
    metadata,
    owned_by_jobset,
    patched,
    queue_labels,
    volumes,
)
from runner.targets.rules import gang_policy, restart_rules
from runner.targets.submission import Submission
from runner.targets.template import Tree, load, merge

NODE = "node"
"""The name that Trainer wants the container to have."""

PATCHED = (
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "nodeSelector",
    "affinity",
    "tolerations",
    "imagePullSecrets",
)
"""What a TrainJob may say of its pods, of what the runner says."""


def objects(submission: Submission) -> list[Tree]:
    """In the order in which they are created."""
    return [runtime(), config_map(submission), _train_job(submission)]


def runtime() -> Tree:
    """The ClusterTrainingRuntime: the base Job's pods, and the retry rules."""
    base = load(BASE)["spec"]
    template = owned_by_jobset(base["template"])
    (container,) = template["spec"]["containers"]
    container["name"] = NODE
    spec: Tree = {
        "podReplacementPolicy": base["podReplacementPolicy"],
        "podFailurePolicy": gang_policy(NODE),
        "template": template,
    }
    patch: Tree = {
        "failurePolicy": {"rules": restart_rules()},
        "replicatedJobs": [{"name": "node", "template": {"spec": spec}}],
    }
    return merge(load("runtime.yaml"), {"spec": {"template": {"spec": patch}}})


def _train_job(submission: Submission) -> Tree:
    job = submission.job
    template = patched(submission)["spec"]["template"]
    (container,) = template["spec"]["containers"]
    base = {one["name"]: one for one in load(BASE)["spec"]["template"]["spec"]["containers"][0]["env"]}
    changed = [one for one in container["env"] if base.get(one["name"]) != one]
    if GRACE not in {one["name"] for one in container["env"]}:
        changed.append({"name": GRACE, "value": ""})  # nobody knows it, and the runtime says one
    pods: Tree = {name: template["spec"][name] for name in PATCHED if name in template["spec"]}
    # The runtime's optional token stays where the job names none.
    pods["volumes"] = [
        one for one in template["spec"]["volumes"] if one["name"] in {v["name"] for v in volumes(submission)}
    ]
    trainer: Tree = {
        "numNodes": job.launch.nodes,
        "image": container["image"],
        "resourcesPerNode": container["resources"],
        "env": changed,
    }
    of_pods = {"template": {"metadata": template["metadata"], "spec": pods}}
    node: Tree = {"name": NODE, "template": {"spec": of_pods}}
    patch: Tree = {
        "metadata": merge(metadata(submission), {"labels": queue_labels(job)}),
        "spec": {
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "vlm-runner/render",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
                }
            ],
        },
    }
    if (limit := deadline(job)) is not None:
        patch["spec"]["activeDeadlineSeconds"] = limit
    return merge(load("trainjob.yaml"), patch)
