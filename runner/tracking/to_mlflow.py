"""MLflow: a run that is found again by a tag; on the server of MLFLOW_TRACKING_URI, else in files of its own.

The store of files needs no database driver; `mlflow` reads it with MLFLOW_ALLOW_FILE_STORE=true.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from runner.tracking.request import Request
from runner.tracking.rows import Ending, Known, Row

ID = "vlm-runner.id"
"""The tag."""

AT_ONCE = 100
"""Rows, or parameters, of a request: it may have 1000 metrics and 100 parameters."""

LONGEST = 250
"""Characters of a parameter's name."""

_STATUS = {"done": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


class MlFlow:
    """One run."""

    def __init__(self, request: Request) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or request.folder.as_uri()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or request.project
        self._client = MlflowClient(tracking_uri=uri)
        run = self._found(experiment, request)
        self._run = run.info.run_id
        self._metrics = list(run.data.metrics)
        self._client.update_run(self._run, status="RUNNING")
        named = {_named(key): str(value) for key, value in request.config.items()}
        params = [Param(key, value) for key, value in named.items() if key not in run.data.params]
        for begin in range(0, len(params), AT_ONCE):
            self._client.log_batch(self._run, params=params[begin : begin + AT_ONCE])

    def _found(self, name: str, request: Request) -> Run:
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([place], f"tags.`{ID}` = '{request.id}'")
        if found:
            return found[0]
        return self._client.create_run(place, tags={ID: request.id}, run_name=request.name)

    def known(self) -> Known:
        """The history of every metric."""
        return {
            name: {metric.step for metric in self._client.get_metric_history(self._run, name)}
            for name in self._metrics
        }

    def log(self, rows: Sequence[Row]) -> None:
        """A request for some rows."""
        for begin in range(0, len(rows), AT_ONCE):
            metrics = [
                Metric(name, value, round(1000 * (row.time or time.time())), row.step)
                for row in rows[begin : begin + AT_ONCE]
                for name, value in row.values.items()
            ]
            self._client.log_batch(self._run, metrics=metrics)

    def end(self, ending: Ending | None) -> None:
        """Say how it ended."""
        if ending is None:
            return
        told = {"outcome": ending.outcome, "exit_code": ending.exit_code, **ending.summary}
        tags = [RunTag(f"vlm-runner.{name}", str(value)) for name, value in told.items()]
        self._client.log_batch(self._run, tags=tags)
        self._client.set_terminated(self._run, _STATUS.get(ending.outcome, "FAILED"))


def _named(key: str) -> str:
    """A key of the job as mlflow takes it, which refuses the regular expressions of `lora.rank_pattern`. Its
    files are folders where a slash is."""
    return re.sub(r"[^\w.: -]", "_", key)[:LONGEST]
