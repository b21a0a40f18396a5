"""Jobs on their way to every target, for the tests of `runner.targets`, and their golden files.

    python -m tests.submitted        writes tests/data/golden/ again; look at `git diff` afterwards

A golden file is what `runner render` prints, without the job itself, which other defaults would change.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.settings import resolve
from runner.targets import TARGETS, Submission, render, submission
from runner.targets.documents import documents

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
JOB = "<the job>"

STORE = "checkpoints.uri=s3://my-bucket/runs"
PLACES = [
    STORE,
    "kubernetes.image=registry.example.com/vlm-runner@sha256:" + "0" * 64,
    "aws_batch.image=registry.example.com/vlm-runner:0.1.0",
    "aws_batch.queue=gpu-spot",
    "gcp_batch.image=registry.example.com/vlm-runner:0.1.0",
    "gcp_batch.machine_type=g2-standard-8",
]
"""The least that a job needs on every target."""

FULL = [
    "resources={gpu: 2, cpu: 16, memory: 96Gi, shm: 24Gi, ephemeral_storage: 300Gi, spot: true,"
    " time_limit: 48h}",
    "launch.gpus_per_node=2",
    "kubernetes={image: 'registry.example.com/vlm-runner:0.1.0', image_pull_secrets: [registry],"
    " namespace: vlm, service_account: trainer, cloud: gke, node_selector: {disk: nvme}, tolerations:"
    " [{key: team, operator: Equal, value: vlm, effect: NoSchedule}], queue: gpu-spot, queue_priority: low,"
    " topology: cloud.google.com/gke-nodepool, labels: {team: vlm}, annotations: {team/contact: vlm},"
    " env: {AWS_REGION: eu-west-1}, hf_token_from: hub/read, keep_finished: 2h}",
    "aws_batch={image: 'registry.example.com/vlm-runner:0.1.0', queue: gpu-spot, region: eu-west-1, job_role:"
    " 'arn:aws:iam::123456789012:role/trainer', execution_role: 'arn:aws:iam::123456789012:role/pull',"
    " attempts: 4, env: {NCCL_DEBUG: WARN}, secrets: [{variable: HF_TOKEN, reference:"
    " 'arn:aws:secretsmanager:eu-west-1:123456789012:secret:hub'}], log_group: /vlm, share: vlm, priority: 5,"
    " tags: {team: vlm}}",
    "gcp_batch={image: 'registry.example.com/vlm-runner:0.1.0', project: my-project, region: europe-west4,"
    " locations: [zones/europe-west4-a], machine_type: g2-standard-24, service_account:"
    " trainer@my-project.iam.gserviceaccount.com, network: global/networks/vlm, external_ip: false,"
    " retries: 4, env: {AWS_REGION: eu-west-1}, secrets: [{variable: HF_TOKEN, reference:"
    " projects/my-project/secrets/hub/versions/latest}], labels: {team: vlm}}",
    STORE,
]
"""Every key that all targets with such a section can do."""

OF_PODS = ["kubernetes.priority_class=batch", "kubernetes.env_from=[s3]"]
"""What a Job's and a JobSet's pods can have besides."""

NODES = [
    "launch={nodes: 2, gpus_per_node: 8}",
    "resources.gpu=8",
    "kubernetes.cloud=aws",
    "resources.spot=true",
]

CASES: dict[tuple[str, str], list[str]] = {
    **{(target, "least"): PLACES for target in TARGETS},
    **{
        (target, "full"): FULL + (OF_PODS if target in ("kubernetes", "jobset") else []) for target in TARGETS
    },
    **{(target, "nodes"): PLACES + NODES for target in ("kubernetes", "jobset", "trainjob")},
    ("kubernetes", "cpu"): [*PLACES, "resources.gpu=0", "resources.spot=true", "kubernetes.cloud=azure"],
}
"""(target, case) -> overrides of jobs/demo-sft.yaml."""


def submit(
    *overrides: str, job: str = "jobs/demo-sft.yaml", name: str | None = "demo-sft-12345"
) -> Submission:
    """A submission of a shipped job."""
    return submission(resolve(str(ROOT / job), list(overrides), {}), name)


def rendered(target: str, case: str) -> list[dict[str, Any]]:
    """The objects of a case."""
    return render(target, submit(*CASES[target, case]))


def objects(*, kind: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of every case for Kubernetes, with where it comes from."""
    for target, case in CASES:
        if target.endswith("-batch"):
            continue
        for one in rendered(target, case):
            if not kind or one["kind"] == kind:
                yield f"{target}-{case}", one


def golden(target: str, case: str) -> tuple[Path, str]:
    """The golden file of a case, and what it should say."""
    trees = copy.deepcopy(rendered(target, case))
    for tree in trees:
        _without_job(tree)
    if not target.endswith("-batch"):
        return GOLDEN / f"{target}-{case}.yaml", documents(trees)
    tree = {key: value for one in trees for key, value in one.items()}
    return GOLDEN / f"{target}-{case}.json", json.dumps(tree, indent=2) + "\n"


def _without_job(tree: Any) -> None:
    if isinstance(tree, dict):
        for key in ("job.yaml", "JOB_YAML"):
            if key in tree:
                tree[key] = JOB
        if tree.get("name") == "JOB_YAML":
            tree["value"] = JOB
        for value in tree.values():
            _without_job(value)
    elif isinstance(tree, list):
        for item in tree:
            _without_job(item)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for place in CASES:
        path, text = golden(*place)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
