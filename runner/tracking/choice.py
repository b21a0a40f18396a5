"""Which trackers a job asks for. Imports none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

PACKAGES: dict[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "pip install 'vlm-runner[tracking]'"),
    "wandb": ("wandb", "pip install 'vlm-runner[tracking]'"),
    "mlflow": ("mlflow", "pip install 'vlm-runner[tracking]'"),
    "trackio": ("trackio", "pip install 'vlm-runner[trackio]'"),
}
"""Each tracker: the package that it imports, and how that is installed."""

TRACKERS: tuple[str, ...] = tuple(PACKAGES)

NONE = "none"


def asked(report_to: Any) -> list[str]:
    """The trackers of a `training.report_to` that has no `unknown` ones, each once, in its order.

    null, none, [], [none]    none
    wandb                     wandb
    [mlflow, wandb]           mlflow, wandb
    [wandb, wandb]            wandb
    """
    return [name for name in dict.fromkeys(_words(report_to)) if name != NONE]


def unknown(report_to: Any) -> list[str]:
    """The words of a `training.report_to` that are no tracker here.

    none, wandb, [mlflow, wandb]    none
    all                             all: it would be whatever happens to be installed
    [wandb, comet_ml]               comet_ml
    [none, wandb]                   none: it says two things
    """
    words = _words(report_to)
    known = (*TRACKERS, NONE) if len(words) == 1 else TRACKERS
    return [word for word in words if word not in known]


def missing(trackers: Sequence[str]) -> list[str]:
    """Those whose package is not installed here.

    A folder of that name, as wandb's own where one stands, is no package.
    """
    specs = {name: importlib.util.find_spec(PACKAGES[name][0]) for name in trackers}
    return [name for name, spec in specs.items() if spec is None or spec.origin is None]


def remedy(trackers: Sequence[str]) -> str:
    """How missing packages are installed."""
    return ", ".join(dict.fromkeys(PACKAGES[name][1] for name in trackers))


def _words(report_to: Any) -> list[str]:
    words = report_to if isinstance(report_to, list) else [report_to]
    return [NONE if word is None else str(word) for word in words]
