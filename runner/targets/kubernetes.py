"""A job as a Kubernetes Job with its ConfigMap; of several nodes as an Indexed Job with a Service, too."""

from __future__ import annotations

from runner.targets.pods import config_map, deadline, metadata, patched
from runner.targets.rules import failure_policy
from runner.targets.submission import Submission
from runner.targets.template import Tree, load, merge

INDEXED = "kubernetes/components/indexed"


def objects(submission: Submission) -> list[Tree]:
    """In the order in which they are created."""
    job = submission.job
    base = patched(submission)
    spec: Tree = {"podFailurePolicy": failure_policy()}
    if (limit := deadline(job)) is not None:
        spec["activeDeadlineSeconds"] = limit
    if job.launch.nodes == 1:
        return [config_map(submission), _job(submission, base, spec)]
    counts = {"completions": job.launch.nodes, "parallelism": job.launch.nodes}
    found_by = {"template": {"spec": {"subdomain": submission.name}}}
    indexed = merge(base, load(f"{INDEXED}/patch.yaml"))
    service = merge(
        load(f"{INDEXED}/service.yaml"),
        {
            "metadata": metadata(submission),
            "spec": {"selector": {"batch.kubernetes.io/job-name": submission.name}},
        },
    )
    return [config_map(submission), service, _job(submission, indexed, {**spec, **counts, **found_by})]


def _job(submission: Submission, base: Tree, spec: Tree) -> Tree:
    return merge(base, {"metadata": {"name": submission.name}, "spec": spec})
