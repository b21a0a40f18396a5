"""A resolved job as YAML, with the source of every value beside it. It reads back as the same job."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from runner.job.yaml_source import AMBIGUOUS, Path, scalar, show_path
from runner.settings import Resolved

WIDTH = 72
"""Column of the comments."""


def resolved_yaml(resolved: Resolved) -> str:
    """The job, complete with its defaults; every line ends with where its value comes from."""
    return "\n".join(_mapping(resolved.job.model_dump(mode="json"), (), resolved.sources, "")) + "\n"


def _mapping(node: dict[str, Any], path: Path, sources: dict[str, str], indent: str) -> list[str]:
    lines = []
    for key, value in node.items():
        here = (*path, key)
        lines += _entry(f"{indent}{_text(key)}:", value, here, sources, indent + "  ")
    return lines


def _sequence(node: list[Any], path: Path, sources: dict[str, str], indent: str) -> list[str]:
    lines: list[str] = []
    for index, item in enumerate(node):
        here = (*path, index)
        if isinstance(item, dict) and item:
            first, *rest = _mapping(item, here, sources, indent + "  ")
            lines += [f"{indent}- {first.strip()}", *rest]
        else:
            lines += _entry(f"{indent}-", item, here, sources, indent + "  ")
    return lines


def _entry(start: str, value: Any, path: Path, sources: dict[str, str], indent: str) -> list[str]:
    if isinstance(value, dict) and value:
        return [start, *_mapping(value, path, sources, indent)]
    if isinstance(value, list) and value:
        return [start, *_sequence(value, path, sources, indent)]
    return [f"{f'{start} {_scalar(value)}':<{WIDTH}}  # {sources[show_path(path)]}"]


def _scalar(value: Any) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    if (
        re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII)
        and isinstance(scalar(text), str)
        and text not in AMBIGUOUS
    ):
        return text
    # safe_dump knows what YAML cannot print; in double quotes and without a width it stays on one line.
    dumped: str = yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)
    return dumped.rstrip("\n")
