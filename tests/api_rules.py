"""What a Kubernetes API server refuses though the schema allows it, as assertions: seen on 1.36."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Tree = dict[str, Any]

LABEL = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
QUALIFIED = r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"


def check(tree: Tree) -> None:
    """Assert every rule that concerns this object."""
    _metadata(tree["metadata"])
    kind, name = tree["kind"], tree["metadata"]["name"]
    if kind == "Job":
        indexed = tree["spec"].get("completionMode") == "Indexed"
        assert len(f"{name}-{tree['spec']['completions'] - 1}" if indexed else name) <= 63
        _job(tree["spec"])
    elif kind == "JobSet":
        for job in tree["spec"]["replicatedJobs"]:
            assert len(f"{name}-{job['name']}-0-0-xxxxx") <= 63
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
            _job(job["template"]["spec"])
        _failure_policy(tree["spec"]["failurePolicy"])
    elif kind == "ClusterTrainingRuntime":
        for job in tree["spec"]["template"]["spec"]["replicatedJobs"]:
            _job(job["template"]["spec"])
        _failure_policy(tree["spec"]["template"]["spec"]["failurePolicy"])
    elif kind == "TrainJob":
        assert len(f"{name}-node-0-0-xxxxx") <= 63
    elif kind == "Service":
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name)
    elif kind == "ConfigMap":
        assert sum(len(text.encode()) for text in tree["data"].values()) <= 1 << 20


def pod_specs(tree: Any) -> Iterator[Tree]:
    """Every pod spec inside an object."""
    if isinstance(tree, dict):
        if "containers" in tree and "restartPolicy" in tree:
            yield tree
        for value in tree.values():
            yield from pod_specs(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from pod_specs(item)


def _metadata(metadata: Tree) -> None:
    for key, value in metadata.get("labels", {}).items():
        assert re.fullmatch(QUALIFIED, key), key
        assert re.fullmatch(LABEL, value), value
    for key in metadata.get("annotations", {}):
        assert re.fullmatch(QUALIFIED, key), key


def _job(spec: Tree) -> None:
    pod = spec["template"]["spec"]
    _metadata(spec["template"].get("metadata", {}))
    _pod(pod)
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod["restartPolicy"] == "Never"
    containers = {one["name"] for one in pod["containers"]}
    rules = spec["podFailurePolicy"]["rules"]
    assert len(rules) <= 20
    for rule in rules:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            values = rule["onExitCodes"]["values"]
            assert values == sorted(set(values))
            assert 0 not in values and values and len(values) <= 255
            assert rule["onExitCodes"]["containerName"] in containers
        else:
            assert all(
                one == {"type": "DisruptionTarget", "status": "True"} for one in rule["onPodConditions"]
            )
    if "successPolicy" in spec:
        assert spec["completionMode"] == "Indexed"
    if spec.get("completionMode") == "Indexed":
        assert spec["completions"] == spec["parallelism"]


def _pod(pod: Tree) -> None:
    volumes = {one["name"] for one in pod["volumes"]}
    assert len(volumes) == len(pod["volumes"])
    for container in pod["containers"]:
        amounts = container["resources"]
        assert amounts["requests"] == amounts["limits"]
        names = [one["name"] for one in container["env"]]
        assert len(names) == len(set(names))
        assert {one["name"] for one in container["volumeMounts"]} == volumes
        paths = [one["mountPath"] for one in container["volumeMounts"]]
        assert len(paths) == len(set(paths))
        for variable in container["env"]:
            assert ("value" in variable) != ("valueFrom" in variable)
            assert isinstance(variable.get("value", ""), str)
    for one in pod["tolerations"]:
        assert "tolerationSeconds" not in one or one["effect"] == "NoExecute"
        assert not (one["operator"] == "Exists" and "value" in one)


def _failure_policy(policy: Tree) -> None:
    names = [rule["name"] for rule in policy["rules"]]
    assert len(names) == len(set(names))
    for name in names:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name)
