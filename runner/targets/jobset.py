"""A job as a JobSet: for several nodes, which start again together, and for long runs of one node on spot."""

from __future__ import annotations

from runner.targets.pods import (
    TRAINER,
    config_map,
    deadline,
    metadata,
    owned_by_jobset,
    patched,
    queue_labels,
)
from runner.targets.rules import gang_policy, restart_rules
from runner.targets.submission import Submission
from runner.targets.template import Tree, load, merge


def objects(submission: Submission) -> list[Tree]:
    """In the order in which they are created."""
    job, base = submission.job, patched(submission)
    template = owned_by_jobset(base["spec"]["template"])
    spec: Tree = {
        "completions": job.launch.nodes,
        "parallelism": job.launch.nodes,
        "podReplacementPolicy": base["spec"]["podReplacementPolicy"],
        "podFailurePolicy": gang_policy(TRAINER),
        "template": template,
    }
    if (limit := deadline(job)) is not None:
        spec["activeDeadlineSeconds"] = limit
    about = metadata(submission)
    patch: Tree = {
        "metadata": merge(about, {"labels": queue_labels(job)}),
        "spec": {
            "ttlSecondsAfterFinished": base["spec"]["ttlSecondsAfterFinished"],
            "failurePolicy": {"rules": restart_rules()},
            "replicatedJobs": [{"name": "node", "template": {"spec": spec}}],
        },
    }
    return [config_map(submission), merge(load("jobset.yaml"), patch)]
