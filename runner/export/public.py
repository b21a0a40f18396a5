"""A job as others may see it: without where it ran, and without paths of this machine. Pure.

    resources, kubernetes, aws_batch, gcp_batch, launch, checkpoints     left out: places and accounts
    organisation/name, demo:name                                         as they are
    /data/charts, ~/charts, ../charts, file:///data/charts               ./charts: its last part

What is left reads back as a job that trains the same, where the data of its local paths is put.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from runner.job.secrets import without_secrets
from runner.manifest import Job, looks_local

_PLACES = ("resources", "kubernetes", "aws_batch", "gcp_batch", "launch", "checkpoints")
_PATHS = ("name_or_path", "path", "image_folder", "data_files", "init_from")
"""Keys of paths; under `training`, upstream's own, every text may be one."""


def public_path(path: str) -> str:
    """A path or an id without what only this machine has."""
    plain = path.removeprefix("file://")
    if plain == path and not looks_local(path):
        return path
    return f"./{plain.rstrip('/').rpartition('/')[2].lstrip('~') or 'here'}"


def public_job(job: Job, environ: Mapping[str, str]) -> str:
    """The job as YAML, with its defaults.

    Args:
        environ: whose credentials shall not stand in it, should a job have them after all.
    """
    tree = {key: value for key, value in job.model_dump(mode="json").items() if key not in _PLACES}
    text: str = yaml.safe_dump(_cleaned(tree, ()), sort_keys=False, allow_unicode=True, width=110)
    head = "# The job that trained this; paths of its machine are shortened to ./name."
    return f"{head}\n" + without_secrets(text, environ)


def _cleaned(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        return {key: _cleaned(value, (*path, key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_cleaned(value, path) for value in node]
    if isinstance(node, str) and (path[-1] in _PATHS or path[0] == "training"):
        return public_path(node)
    return node
