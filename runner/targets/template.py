"""Templates as data: read from the files beside this module, changed by merging, never by text.

`templates/kubernetes` is the repository's own `k8s/`, which `kubectl kustomize` builds, and no copy of it.
"""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

import yaml

Tree = dict[str, Any]

KEYS = {
    **dict.fromkeys(("containers", "env", "volumes", "imagePullSecrets", "replicatedJobs"), "name"),
    "volumeMounts": "mountPath",
}
"""Lists that merge item by item, and the key that tells the items apart, as in Kubernetes' own merge. All
other lists take the place of the former."""


def load(name: str) -> Tree:
    """One template, a mapping of its own each time.

    Args:
        name: path below `templates/`; YAML or JSON, which YAML reads.
    """
    file = resources.files("runner.targets") / "templates" / name
    document: Tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    return document


def merge(base: Tree, patch: Tree) -> Tree:
    """`base` with `patch` over it, neither changed: the strategic merge of kubectl and Kustomize.

    base                   patch                    result
    {a: 1, b: 2}           {b: 3, c: 4}             {a: 1, b: 3, c: 4}
    {a: {b: 1}}            {a: {c: 2}}              {a: {b: 1, c: 2}}
    {a: 1, b: 2}           {a: null}                {b: 2}
    env [{name: A, ..}]    env [{name: B, ..}]      env [{name: A, ..}, {name: B, ..}]
    env [{name: A, v: 1}]  env [{name: A, v: 2}]    env [{name: A, v: 2}]
    env [{name: A, ..}]    env [{name: A, $patch: delete}]   env []
    tolerations [x]        tolerations [y]          tolerations [y]
    """
    merged = copy.deepcopy(base)
    for name, value in patch.items():
        there = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = merge(there if isinstance(there, dict) else {}, value)
        elif name in KEYS and isinstance(there, list):
            merged[name] = _items(there, value, KEYS[name])
        else:
            merged[name] = copy.deepcopy(value)
    return merged


def _items(base: list[Tree], patch: list[Tree], key: str) -> list[Tree]:
    changes = {item[key]: item for item in patch}
    gone = {name for name, item in changes.items() if item.get("$patch") == "delete"}
    kept = [merge(item, changes.pop(item[key], {})) for item in base if item[key] not in gone]
    return [*kept, *(merge({}, item) for name, item in changes.items() if name not in gone)]
