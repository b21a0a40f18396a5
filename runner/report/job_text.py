"""A resolved job as it stands in job.yaml, value by value with its source. Pure.

`runner.job.resolved` writes every leaf on a line of its own, followed by where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from runner.job.yaml_source import LOADER, parse, scalar

DEFAULT = "default"


@dataclass(frozen=True)
class Value:
    """One value of a job."""

    key: str
    """Dotted: `datasets.train[0].split`."""
    value: Any
    """A scalar, or an empty list or mapping."""
    source: str
    """`default`, `command line`, `<file>:<line>`, ..."""

    @property
    def is_default(self) -> bool:
        return self.source == DEFAULT


def values(data: bytes) -> tuple[Value, ...]:
    """The values of a job.yaml in its order; nothing of what is none."""
    said = data.decode("utf-8", "replace")
    if parse(said).faults:  # it is bounded where PyYAML is not
        return ()
    root = yaml.compose(said, Loader=LOADER)
    return tuple(_leaves(root, "", said)) if isinstance(root, yaml.MappingNode) else ()


def nested(data: bytes) -> Mapping[str, Any]:
    """The job itself; empty where it is none."""
    value = parse(data.decode("utf-8", "replace")).value
    return value if isinstance(value, dict) else {}


def _leaves(node: yaml.Node, key: str, said: str) -> Iterator[Value]:
    if isinstance(node, yaml.MappingNode) and node.value:
        for name, child in node.value:
            yield from _leaves(child, f"{key}.{name.value}" if key else str(name.value), said)
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for index, child in enumerate(node.value):
            yield from _leaves(child, f"{key}[{index}]", said)
    else:
        rest = said[node.end_mark.index :].partition("\n")[0].strip()
        yield Value(key, _value(node), rest.removeprefix("#").strip() or DEFAULT)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else scalar(node.value)
    return {} if isinstance(node, yaml.MappingNode) else []
