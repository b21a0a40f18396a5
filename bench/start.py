"""From the command to the end of the first optimizer step: `runner train` against a plain TRL script.

Both are started as a person starts them, train the same rows of the same model with the same micro-batch,
and stop after that step; ours into a fresh run folder, without evaluation, with everything that a run does
before it trains: the lock, the store, the lease, the check of all rows, the audit of the labels. Two models:
the demo's, and one at SmolVLM's proportions (`attempt.py`), whose step is longer. Two states of the cache of
`datasets`, the same for both: cold, a new one for every process, and warm, one that a run before has filled.

The two run at once, each on a core of its own, and change cores from round to round, so that whatever else
the machine does meets both. The ratio is of the medians. On a busy machine the seconds say little; the CPU
seconds of all processes are steadier, and count our save and export against us. `--auto` leaves the
micro-batch to the runner, so that a probe comes on top, which plain TRL has not.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for both, as the supervisor sets it for trainers
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from attempt import build_model, build_rows
from speed_cases import LORA
from speed_models import IDEFICS3, TILES

from runner.demo import resolve_dataset, resolve_model
from runner.supervisor.fetch import cache_folder

ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""What is installed is compiled, and so is this checkout by the round before the first: else its three
processes would compile it every time, which takes half a second."""

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
        "lora": LORA,
        "datasets": {"train": [source]},
        "training": {
            **TRAINING,
            "global_batch_size": case.batch,
            "per_device_train_batch_size": "auto" if auto else case.batch,
        },
    }


@dataclass(frozen=True)
class Start:
    """Of one command."""

    seconds: float
    """Until the first step has ended."""
    cpu: float
    """Of all its processes until the command has ended, in seconds; ours has saved and exported by then."""


def started(command: list[str], folder: Path, environ: dict[str, str], core: int) -> tuple[str, float]:
    """Run a command on one core: what it printed, and its CPU seconds. Ends this program when it fails."""
    log = folder / "printed"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environ,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command} failed: {log.read_text()[-2000:]}")
    return log.read_text(), used.ru_utime + used.ru_stime


def ours(case: Case, folder: Path, environ: dict[str, str], core: int, auto: bool) -> Start:
    """`runner train`, to the event of the first step."""
    file = folder / "job.json"
    file.write_text(json.dumps(job(case, auto)))
    began = time.time()
    command = [sys.executable, "-m", "runner", "train", str(file), "--runs", str(folder / "runs")]
    _, cpu = started(command, folder, environ, core)
    events = map(json.loads, (folder / "runs" / "start" / "events.jsonl").read_text().splitlines())
    told: float = next(event["time"] for event in events if event["event"] == "step")
    return Start(told - began, cpu)


def spec(case: Case) -> dict[str, Any]:
    """The case for `bench/plain_trl.py`, which draws the same order of rows."""
    return {
        "method": "sft",
        "model": str(case.model),
        "data": str(case.data),
        "rows": case.rows,
        "order": None,
        "seed": SEED,
        "device": "cpu",
        "dtype": "float32",
        "quantization": None,
        "processor": case.processor,
        "lora": {**LORA, "exclude_modules": IDEFICS3["frozen"]},
        "training": {
            **TRAINING,
            "per_device_train_batch_size": case.batch,
            "gradient_accumulation_steps": 1,
        },
    }


def plain(case: Case, folder: Path, environ: dict[str, str], core: int) -> Start:
    """`bench/plain_trl.py`, to the end of its first step."""
    file = folder / "plain.json"
    file.write_text(json.dumps(spec(case)))
    began = time.time()
    script = str(Path(__file__).absolute().with_name("plain_trl.py"))
    printed, cpu = started([sys.executable, script, str(file)], folder, environ, core)
    ended: float = json.loads(printed.splitlines()[-1])["ended"][0]
    return Start(ended - began, cpu)


def cases(folder: Path, wanted: list[str]) -> dict[str, Case]:
    """The models and their rows, made in `folder`."""
    found = {}
    if "demo" in wanted:
        charts = next((resolve_dataset("demo:charts", cache_folder(os.environ)) / "data").glob("train*"))
        found["demo"] = Case(resolve_model("demo:smolvlm-tiny"), charts, rows=64, batch=8, processor={})
    if "bench" in wanted:
        build_model(folder / "model")
        build_rows(folder / "rows.parquet", rows=16)
        found["bench"] = Case(folder / "model", folder / "rows.parquet", 16, 1, TILES)
    return found


def one_round(case: Case, root: Path, label: str, turn: int, warm: bool, auto: bool) -> dict[str, Start]:
    """Both, run at once."""

    def one(who: str, core: int) -> Start:
        folder = root / f"{label}-{turn}-{who}"
        folder.mkdir()
        kept = f"cache-{label}-{who}-{'warm' if warm else turn}"
        environ = {**ENVIRON, "HF_DATASETS_CACHE": str(root / kept)}
        return (
            ours(case, folder, environ, core, auto) if who == "ours" else plain(case, folder, environ, core)
        )

    cores = sorted(os.sched_getaffinity(0))
    with ThreadPoolExecutor(2) as pool:
        both = {
            who: pool.submit(one, who, cores[(number + turn) % 2])
            for number, who in enumerate(("ours", "plain TRL"))
        }
        return {who: future.result() for who, future in both.items()}


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
                found: dict[str, list[Start]] = {"ours": [], "plain TRL": []}
                for turn in range(-1, asked.rounds):  # the round before the first fills the warm cache
                    took = one_round(case, root, f"{label}-{cache}", turn, cache == "warm", asked.auto)
                    for who, values in found.items():
                        values += [took[who]] if turn >= 0 else []
                for what in ("seconds", "cpu"):
                    print(f"{label}, {cache} cache: {compared(found, what)}", flush=True)


def compared(found: dict[str, list[Start]], what: str) -> str:
    """Medians, ranges and the ratio, for a person."""
    values = {who: [getattr(one, what) for one in starts] for who, starts in found.items()}
    middle = {who: statistics.median(numbers) for who, numbers in values.items()}
    shown = ", ".join(
        f"{who} {middle[who]:.2f} ({min(numbers):.2f} to {max(numbers):.2f})"
        for who, numbers in values.items()
    )
    return f"{what} {shown}; ratio {middle['ours'] / middle['plain TRL']:.2f}"


if __name__ == "__main__":
    main()
