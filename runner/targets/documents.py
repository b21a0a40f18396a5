"""Objects as YAML documents that kubectl reads as they are meant."""

from __future__ import annotations

import re
from typing import Any

import yaml

_OTHER_IN_GO = re.compile(
    r"[yYnN]|[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?0[obOB][0-9_]+", re.ASCII
)
"""Text that kubectl's YAML takes for a truth value or a number without quotes, though PyYAML needs none."""


class _Dumper(yaml.SafeDumper):
    """Text of several lines stays readable; nothing is an alias of something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if _OTHER_IN_GO.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def documents(objects: list[dict[str, Any]]) -> str:
    """Objects as YAML documents."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, explicit_start=True
    )
