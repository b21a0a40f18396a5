"""Objects of Kubernetes as YAML, to be read and diffed by people."""

from __future__ import annotations

from typing import Any

import yaml

from runner.targets.template import Tree


class _Dumper(yaml.SafeDumper):
    """Text of several lines stays readable; nothing is an alias of something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def documents(objects: list[Tree]) -> str:
    """Objects as YAML documents."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, explicit_start=True
    )
