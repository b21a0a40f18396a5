"""What a tracker's own reader finds of a run: `read_tracker.py NAME FOLDER` prints JSON.

A process of its own, because these libraries are heavy and warn.

    {"runs": 1, "metrics": {name: [[step, value], ...]}, "words": text that says the job and the outcome}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Metrics = dict[str, list[tuple[int, float]]]


def tensorboard(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    reader = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0})
    reader.AddRunsFromDirectory(str(folder)).Reload()
    (run,) = reader.Runs()
    tags = reader.Runs()[run]
    metrics = {name: [(one.step, one.value) for one in reader.Scalars(run, name)] for name in tags["scalars"]}
    words = [str(one.tensor_proto) for name in tags["tensors"] for one in reader.Tensors(run, name)]
    return {"runs": 1, "metrics": metrics, "words": "\n".join(words)}


def wandb(folder: Path) -> dict[str, Any]:
    metrics: Metrics = {}
    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()
        records += [json.loads(line) for line in lines]
    for record in records:
        if record["type"] == "history":
            row = record["history"]["item"]
            for name in row.keys() - {"train/global_step", "_step", "_runtime", "_timestamp"}:
                metrics.setdefault(name, []).append((row["train/global_step"], row[name]))
    ids = {record["run"]["run_id"] for record in records if record["type"] == "run"}
    return {"runs": len(ids), "metrics": metrics, "words": json.dumps(records)}


def mlflow(folder: Path) -> dict[str, Any]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    id = runs[0].info.run_id
    metrics = {
        name: [(one.step, one.value) for one in client.get_metric_history(id, name)]
        for name in runs[0].data.metrics
    }
    words = json.dumps([runs[0].data.params, runs[0].data.tags, runs[0].info.status])
    return {"runs": len(runs), "metrics": metrics, "words": words}


def trackio(folder: Path) -> dict[str, Any]:
    os.environ["TRACKIO_DIR"] = str(folder)
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (project,) = SQLiteStorage.get_projects()
    runs = list(Api().runs(project))
    metrics: Metrics = {}
    for row in SQLiteStorage.get_logs(project, runs[0].name):
        for name in row.keys() - {"step", "timestamp"}:
            metrics.setdefault(name, []).append((row["step"], row[name]))
    return {"runs": len(runs), "metrics": metrics, "words": json.dumps([runs[0].config, metrics])}


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}

if __name__ == "__main__":
    print(json.dumps(READERS[sys.argv[1]](Path(sys.argv[2]))))
