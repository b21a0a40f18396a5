"""From the command to the end of the first optimizer step: `runner train` against a plain TRL script.

Both are started as a person starts them, train the same rows of the same model with the same micro-batch,
and stop after that step; ours into a fresh run folder, without evaluation, with everything that a run does
before it trains: the lock, the store, the lease, the check of all rows, the audit of the labels. In turn, and
the ratio is of the medians. Two models: the demo's, and one at SmolVLM's proportions (`attempt.py`), whose
step is longer. Two states of the cache of `datasets`, the same for both: cold, a new one for every process,
and warm, one that a run before has filled. `--auto` leaves the micro-batch to the runner, so that a probe
comes on top, which plain TRL has not.

Run as `python bench/start.py [--rounds N] [--model demo|bench] [--cache warm|cold] [--auto]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for both, as the supervisor sets it for trainers

from attempt import build_model, build_rows
from sft_step import LORA, PROCESSOR

from runner.demo import resolve_dataset, resolve_model
from runner.supervisor.fetch import cache_folder

SEED = 5
TRAINING = {"max_steps": 1, "learning_rate": 1e-3, "gradient_checkpointing": True}


@dataclass(frozen=True)
class Case:
    """What both train."""

    model: Path
    data: Path
    rows: int
    batch: int
    processor: dict[str, Any]


def job(case: Case, auto: bool) -> dict[str, Any]:
    """The case as a job."""
    columns = {"question": "query", "answer": "label"}
    source = {"path": str(case.data), "split": f"train[:{case.rows}]", "format": "vqa", "columns": columns}
    return {
        "name": "start",
        "method": "sft",
        "seed": SEED,
        "model": {"name_or_path": str(case.model), "dtype": "float32", "processor": case.processor},
        "lora": {**LORA, "target_modules": "all-linear"},
        "datasets": {"train": [source]},
        "training": {
            **TRAINING,
            "global_batch_size": case.batch,
            "per_device_train_batch_size": "auto" if auto else case.batch,
        },
    }


def ours(case: Case, folder: Path, environ: dict[str, str], auto: bool) -> float:
    """Seconds from the start of `runner train` to the event of the first step."""
    file = folder / "job.json"
    file.write_text(json.dumps(job(case, auto)))
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "runner", "train", str(file), "--runs", str(folder / "runs")],
        capture_output=True,
        text=True,
        env=environ,
    )
    if done.returncode != 0:
        sys.exit(f"the runner failed: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    events = map(json.loads, (folder / "runs" / "start" / "events.jsonl").read_text().splitlines())
    told: float = next(event["time"] for event in events if event["event"] == "step")
    return told - began


def plain(case: Case, folder: Path, environ: dict[str, str]) -> float:
    """Seconds from the start of `bench/plain_trl.py` to the end of its first step."""
    frozen = r"model\.(vision_model|connector)(\..*)?"
    spec = {
        "method": "sft",
        "model": str(case.model),
        "data": str(case.data),
        "rows": case.rows,
        "seed": SEED,
        "dtype": "float32",
        "quantization": None,
        "processor": case.processor,
        "lora": {**LORA, "target_modules": "all-linear", "exclude_modules": frozen},
        "training": {
            **TRAINING,
            "per_device_train_batch_size": case.batch,
            "gradient_accumulation_steps": 1,
        },
    }
    file = folder / "plain.json"
    file.write_text(json.dumps(spec))
    began = time.time()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_trl.py")), str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environ,
    )
    if done.returncode != 0:
        sys.exit(f"plain TRL failed: {done.stderr[-2000:]}")
    ended: float = json.loads(done.stdout.splitlines()[-1])["ended"][0]
    return ended - began


def cases(folder: Path, wanted: list[str]) -> dict[str, Case]:
    """The models and their rows, made in `folder`."""
    found = {}
    if "demo" in wanted:
        charts = next((resolve_dataset("demo:charts", cache_folder(os.environ)) / "data").glob("train*"))
        found["demo"] = Case(resolve_model("demo:smolvlm-tiny"), charts, rows=64, batch=8, processor={})
    if "bench" in wanted:
        build_model(folder / "model")
        build_rows(folder / "rows.parquet", rows=16)
        found["bench"] = Case(folder / "model", folder / "rows.parquet", 16, 1, PROCESSOR)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=["demo", "bench"])
    parser.add_argument("--cache", choices=["warm", "cold"])
    parser.add_argument("--auto", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for label, case in cases(root, [asked.model] if asked.model else ["demo", "bench"]).items():
            for cache in [asked.cache] if asked.cache else ["warm", "cold"]:
                seconds: dict[str, list[float]] = {"ours": [], "plain TRL": []}
                # Of a warm cache, a round before the first fills it.
                for turn in range(-1 if cache == "warm" else 0, asked.rounds):
                    for who in seconds:
                        kept = "warm" if cache == "warm" else f"{who}-{turn}"
                        folder = root / f"{label}-{cache}-{turn}-{who}"
                        folder.mkdir()
                        environ = {**os.environ, "HF_DATASETS_CACHE": str(root / f"cache-{label}-{kept}")}
                        took = (
                            ours(case, folder, environ, asked.auto)
                            if who == "ours"
                            else plain(case, folder, environ)
                        )
                        if turn >= 0:
                            seconds[who].append(took)
                middle = {who: statistics.median(values) for who, values in seconds.items()}
                shown = ", ".join(
                    f"{who} {middle[who]:.2f} s ({min(values):.2f} to {max(values):.2f})"
                    for who, values in seconds.items()
                )
                print(
                    f"{label}, {cache} cache: {shown}; ratio {middle['ours'] / middle['plain TRL']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
