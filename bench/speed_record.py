"""What the speed bench keeps of a case: a JSON object with all rounds, the machine, versions, the command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from speed_cases import ALL, OFF, PLAIN
from speed_flops import flops, weights
from speed_runs import Bench, Runs, variants

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
"""Largest difference of a step's loss, by dtype. In bfloat16 equal sums round differently, and a training
goes its own way from there: this tells another loss from the same one, not more."""
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def record(
    bench: Bench, runs: Runs, *, case: str, model: str, config: dict[str, Any], peak: dict[str, Any] | None
) -> dict[str, Any]:
    """A case as bench/results keeps it.

    Args:
        case: its name there, and in the table.
        model: its name there.
        config: the model's configuration.
        peak: of the device, as `speed_flops.peak` says it.
    """
    shape, method = weights(config), runs.case.method
    found = set(runs.rounds) | set(runs.why)
    levers = [name for name in variants(runs.case, bench.device) if name not in (PLAIN, OFF, ALL)]
    return {
        "case": case,
        "model": model,
        "dtype": bench.model.dtype,
        "quantization": bench.model.quantization,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "card": runs.card},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "revision": _revision(),
        "command": " ".join(["python", "bench/speed.py", *sys.argv[1:]]),
        "tolerance": TOLERANCE[bench.model.dtype],
        "steps": runs.steps,
        "steps_per_epoch": runs.steps // runs.case.epochs,
        "samples_per_step": runs.case.questions,
        "sample": asdict(runs.sample),
        "flops": {
            "first": flops(shape, runs.sample, method, reference=True),
            "later": flops(shape, runs.sample, method, reference=False),
        },
        "peak": peak,
        "variants": [
            {"name": name, "not_run": runs.why.get(name), "rounds": runs.rounds.get(name, [])}
            for name in (PLAIN, OFF, *levers, ALL)
            if name in found
        ],
    }


def _cpu() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _revision() -> str | None:
    """Of the code; None outside a repository, as where only the files were copied to."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def keep(folder: Path, records: list[dict[str, Any]]) -> None:
    """A file for each: `<case>-<hardware>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in records:
        machine = one["hardware"]
        where = machine["card"] or f"cpu {machine['cores']} cores {machine['cpu']}"
        slug = "-".join("".join(c if c.isalnum() else " " for c in where.lower()).split())
        (folder / f"{one['case']}-{slug}.json").write_text(json.dumps(one, indent=1) + "\n", "utf-8")
