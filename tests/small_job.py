"""The smallest job, and the same with one value changed."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"name_or_path": "demo:smolvlm-tiny"},
    "datasets": {"train": [{"path": "demo:charts", "format": "vqa"}]},
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """`SMALL` with one value changed; the tree is copied along the path."""
    job = dict(SMALL)
    node: Any = job
    *parents, last = path.split(".")
    for part in parents:
        node[part] = dict(node.get(part, {}))
        node = node[part]
    node[last] = value
    return job
