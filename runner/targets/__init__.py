"""A job as somebody else's object: Kubernetes Job, JobSet, Kubeflow TrainJob, AWS Batch, Google Cloud Batch.

Pure: a submission in, plain data out; nothing here asks a cluster, a cloud or the environment. Each object is
a file of `templates/` with the job's values merged over it, and every retry rule is computed from
`runner.exits`.
"""

from __future__ import annotations

from collections.abc import Callable

from runner.errors import JobError
from runner.targets import aws_batch, gcp_batch, jobset, kubernetes, refusals, trainjob
from runner.targets.submission import Submission, submission
from runner.targets.template import Tree

__all__ = ["TARGETS", "Submission", "render", "submission"]

TARGETS: dict[str, Callable[[Submission], list[Tree]]] = {
    "kubernetes": kubernetes.objects,
    "jobset": jobset.objects,
    "trainjob": trainjob.objects,
    "aws-batch": aws_batch.objects,
    "gcp-batch": gcp_batch.objects,
}


def render(target: str, one: Submission) -> list[Tree]:
    """The objects of a submission, in the order in which they are created.

    Args:
        target: of `TARGETS`.

    Raises:
        JobError: the target cannot do what the job says; all problems at once.
    """
    problems = refusals.of(target, one)
    if problems:
        raise JobError(problems)
    objects = TARGETS[target](one)
    problems = refusals.too_large(target, objects)
    if problems:
        raise JobError(problems)
    return objects
