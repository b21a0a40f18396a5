"""What the process of one tracker is told, in a file, and what it finds in its environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from runner.job.secrets import names_secret, without_secrets

OWN: dict[str, tuple[str, ...]] = {
    "tensorboard": (),
    "wandb": ("WANDB_",),
    "mlflow": ("MLFLOW_", "DATABRICKS_", "AWS_", "GOOGLE_", "AZURE_"),
    "trackio": (),
}
"""Beginnings of variables that may hold credentials of a tracker."""

STORES = (
    "AWS_",
    "GOOGLE_",
    "AZURE_",
    "HF_TOKEN",
    "HUGGING_FACE_",
    "WANDB_",
    "MLFLOW_",
    "DATABRICKS_",
    "TRACKIO_",
)
"""Beginnings of variables that no other tracker gets."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}
"""Trackers are asked for; what they would tell their makers besides is not."""


class Request(BaseModel):
    """What one tracker is to follow."""

    model_config = ConfigDict(frozen=True)

    tracker: str
    run_dir: Path
    folder: Path
    """Of this tracker, in the run's."""
    id: str
    """Of the run, the same in every attempt, on every machine."""
    name: str
    project: str
    config: dict[str, Any]
    """The resolved job by dotted key."""
    batch: int
    """Rows of an optimizer step."""
    before: dict[str, Any] | None = None
    """Metrics before training, if an earlier attempt, here or elsewhere, has evaluated them."""


def without(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Texts without any secret of the environment; a job has none, unless its words happen to be one."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return {
        key: without_secrets(value, environ) if isinstance(value, str) else value
        for key, value in found.items()
    }


def environ_of(tracker: str, environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The supervisor's environment, without what this tracker has no business with.

    Args:
        folder: of the tracker.
    """
    own = OWN[tracker]
    kept = {
        name: value
        for name, value in environ.items()
        if name.startswith(own)
        or not (name.startswith(STORES) or names_secret(name) or name.upper().endswith(("TOKEN", "KEY")))
    }
    return {**kept, **QUIET, **_places(tracker, folder)}


def _places(tracker: str, folder: Path) -> dict[str, str]:
    """Where libraries keep what they cannot be told otherwise."""
    match tracker:
        case "trackio":
            return {"TRACKIO_DIR": str(folder)}
        case "mlflow":
            return {"MLFLOW_ALLOW_FILE_STORE": "true"}  # it calls that maintenance mode, and reads it
        case "wandb":
            cache, data = str(folder / ".cache"), str(folder / ".data")
            return {"WANDB_DIR": str(folder), "WANDB_CACHE_DIR": cache, "WANDB_DATA_DIR": data}
    return {}
