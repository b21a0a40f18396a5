"""A job as a job definition of AWS Batch and its submission, in the words of boto3."""

from __future__ import annotations

from collections.abc import Mapping

from runner import exits
from runner.places import AwsBatch
from runner.section import seconds
from runner.targets.batch import caches, delivery, mebibytes
from runner.targets.submission import Submission
from runner.targets.template import Tree, load, merge

RULES = 5
"""Most rules of evaluateOnExit."""


def objects(one: Submission) -> list[Tree]:
    """Arguments of register_job_definition, and of submit_job, which names no revision of the definition."""
    template, place = load("aws-batch.json"), one.job.aws_batch or AwsBatch()
    tags = {**place.tags, **one.labels}
    name = f"vlm-runner-{one.job.name}"
    definition: Tree = {
        "jobDefinitionName": name,
        "containerProperties": _container(one, place, template["RegisterJobDefinition"]),
        "retryStrategy": {"attempts": place.attempts, "evaluateOnExit": retry_rules()},
        "tags": {key: value for key, value in tags.items() if value != one.name},
    }
    if one.job.resources.time_limit is not None:
        definition["timeout"] = {"attemptDurationSeconds": int(seconds(one.job.resources.time_limit))}
    variable, value = delivery(one)
    submit: Tree = {
        "jobName": one.name,
        "jobQueue": place.queue,
        "jobDefinition": name,
        "containerOverrides": {"environment": [{"name": variable, "value": value}]},
        "tags": tags,
    }
    if place.share is not None:
        submit["shareIdentifier"] = place.share
        if place.priority is not None:
            submit["schedulingPriorityOverride"] = place.priority
    return [
        {"RegisterJobDefinition": merge(template["RegisterJobDefinition"], definition)},
        {"SubmitJob": merge(template["SubmitJob"], submit)},
    ]


def retry_rules() -> list[Tree]:
    """evaluateOnExit, by the table of `runner.exits`: EXIT for what is not retried.

    The first rule that matches wins, and what none matches is retried: codes that are, a machine that was
    taken away, an image that could not be pulled. There may be five rules, and a pattern may end with a star,
    so codes share one where no code of the table that is retried begins alike.
    """
    again = [str(code) for code in (*exits.codes("counted"), *exits.codes("uncounted"))]
    alone = {one[0] for one in again}
    codes = [str(code) for code in exits.codes("no")]
    patterns = dict.fromkeys(code if code[0] in alone else f"{code[0]}*" for code in codes)
    assert len(patterns) <= RULES, "a code that is not retried needs a sixth rule"
    return [{"onExitCode": pattern, "action": "EXIT"} for pattern in patterns]


def _container(one: Submission, place: AwsBatch, template: Tree) -> Tree:
    resources = one.job.resources
    needs = {"VCPU": resources.cpu, "MEMORY": mebibytes(resources.memory)}
    if resources.gpu:
        needs["GPU"] = resources.gpu
    region = {} if place.region is None else {"AWS_REGION": place.region}
    container: Tree = {
        "image": place.image,
        "resourceRequirements": [{"type": kind, "value": str(count)} for kind, count in needs.items()],
        "linuxParameters": {"sharedMemorySize": mebibytes(resources.shm)},
        "environment": template["containerProperties"]["environment"]
        + variables({**caches(), **region, **place.env}),
    }
    if place.job_role is not None:
        container["jobRoleArn"] = place.job_role
    if place.execution_role is not None:
        container["executionRoleArn"] = place.execution_role
    if place.secrets:
        container["secrets"] = [
            {"name": secret.variable, "valueFrom": secret.reference} for secret in place.secrets
        ]
    if place.log_group is not None:
        container["logConfiguration"] = {"options": {"awslogs-group": place.log_group}}
    return container


def variables(values: Mapping[str, str]) -> list[Tree]:
    """Variables as AWS lists them."""
    return [{"name": name, "value": value} for name, value in values.items()]
