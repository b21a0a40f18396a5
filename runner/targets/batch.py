"""What AWS Batch and Google Cloud Batch have in common: how the job arrives, and where caches are."""

from __future__ import annotations

import json
from typing import Literal

from runner.section import size
from runner.targets.pods import BASE
from runner.targets.submission import Submission
from runner.targets.template import Tree, load

INLINE = 8000
"""Bytes of a job that stands in a variable, as JSON in JSON: AWS Batch takes 8,192 of all overrides."""

MIB = 1 << 20


def delivery(one: Submission) -> tuple[Literal["JOB_YAML", "JOB_FILE"], str]:
    """How the job gets into the container: the variable and its value.

    the job on one line has   variable    value
    up to `INLINE` bytes      JOB_YAML    that line
    more                      JOB_FILE    s3://<bucket>/<prefix>/<job.name>/submissions/<submission>.yaml,
                                          where whoever submits has put `Submission.text` before
    """
    if len(json.dumps(one.inline).encode()) <= INLINE:
        return "JOB_YAML", one.inline
    uri = (one.job.checkpoints.uri or "").rstrip("/")
    return "JOB_FILE", f"{uri}/{one.job.name}/submissions/{one.name}.yaml"


def caches() -> dict[str, str]:
    """The variables that keep caches below /scratch, as the pods have them."""
    variables: list[Tree] = load(BASE)["spec"]["template"]["spec"]["containers"][0]["env"]
    return {one["name"]: one["value"] for one in variables if one.get("value", "").startswith("/scratch")}


def mebibytes(quantity: str) -> int:
    """Whole MiB, rounded down: no machine has what was rounded up."""
    return size(quantity) // MIB
