"""Weights & Biases: one run by its id; online with a key in the environment, else folders for `wandb sync`.

Each process writes a folder of its own, of the same run; `wandb sync` sends them in the order of their time.
wandb counts rows by itself and refuses an old number, so the step is a value of each row, as in transformers'
own callback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from runner.tracking.request import Request
from runner.tracking.rows import Ending, Known, Row

STEP = "train/global_step"
"""The metric that the others are drawn over."""


def mode(environ: Mapping[str, str]) -> Any:
    """Where the run goes.

    WANDB_MODE    WANDB_API_KEY, or WANDB_IDENTITY_TOKEN_FILE    mode
    set           -                                              what it says
    not set       set                                            online
    not set       not set                                        offline
    """
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    return environ.get("WANDB_MODE") or ("online" if any(environ.get(key) for key in keys) else "offline")


class WandB:
    """One run."""

    def __init__(self, request: Request) -> None:
        self._mode = mode(os.environ)
        # Before this process adds a folder.
        self._known = _known(_records(request.folder)) if self._mode == "offline" else {}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or request.project,
            id=request.id,
            name=request.name,
            resume="allow",
            mode=self._mode,
            dir=str(request.folder),
            config=dict(request.config),
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",  # nothing of ours is on it
                disable_code=True,
                disable_git=True,
                save_code=False,
                silent=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        if self._mode == "online" and self._run.resumed:
            run = wandb.Api().run(self._run.path)
            self._known = _known(run.scan_history())

    def known(self) -> Known:
        """Rows of earlier processes: of the folders that are here, or as the server has them."""
        return self._known

    def log(self, rows: Sequence[Row]) -> None:
        """One row of history for each."""
        for row in rows:
            self._run.log({STEP: row.step, **row.values})

    def end(self, ending: Ending | None) -> None:
        """Say how it ended."""
        if ending is not None:
            told = {"outcome": ending.outcome, "exit_code": ending.exit_code, **ending.summary}
            self._run.summary.update(told)
        self._run.finish(exit_code=None if ending is None else ending.exit_code)


def _records(folder: Path) -> Iterable[Mapping[str, Any]]:
    """The history of all folders of the run, as `wandb leet inspect` reads it: up to where a kill cut it."""
    for file in sorted(folder.glob("wandb/*run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        for line in done.stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                yield record["history"]["item"]


def _known(records: Iterable[Mapping[str, Any]]) -> Known:
    known: Known = {}
    for record in records:
        step = record.get(STEP)
        for name in record:
            if step is not None and not name.startswith("_") and name != STEP:
                known.setdefault(name, set()).add(int(step))
    return known
