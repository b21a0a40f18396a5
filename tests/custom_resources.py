"""Custom resources against the schemas of their definitions, strictly: an unknown field is an error here,
where an API server would drop it without a word.

The definitions are not part of this repository: `CRD_FOLDER`, else `shared/crd` beside the checkout.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]

FILES = {
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "ClusterTrainingRuntime": "trainer.kubeflow.org_clustertrainingruntimes.yaml",
}


def validate(tree: dict[str, Any]) -> None:
    """Assert that an object is what its definition says; skip the test where there is none."""
    schema, group = _schema(tree["kind"], tree["apiVersion"].rpartition("/")[2])
    assert tree["apiVersion"].partition("/")[0] == group
    jsonschema.Draft202012Validator(schema).validate(tree)


def folder() -> Path:
    """Where the definitions are, whether they are or not."""
    named = os.environ.get("CRD_FOLDER")
    return Path(named) if named else ROOT.parent / "shared" / "crd"


@functools.cache
def _schema(kind: str, version: str) -> tuple[dict[str, Any], str]:
    path = folder() / FILES[kind]
    if not path.exists():
        pytest.skip(f"no {path}: set CRD_FOLDER to a folder with the definitions of JobSet and Trainer")
    definition = yaml.safe_load(path.read_text("utf-8"))["spec"]
    (found,) = [one for one in definition["versions"] if one["name"] == version]
    return _strict(found["schema"]["openAPIV3Schema"]), definition["group"]


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _strict(value) for key, value in node.items()}
    is_closed = node.get("type") == "object" and isinstance(node.get("properties"), dict)
    if is_closed and not node.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result
