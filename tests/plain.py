"""Runs bench/plain_trl.py, which uses nothing of the runner, on the job of tests/attempts.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from runner.demo import resolve_model
from tests.attempts import JOB, charts

BENCH = Path(__file__).parents[1] / "bench" / "plain_trl.py"
FROZEN = r"model\.(vision_model|connector)(\..*)?"


def plain_trl(
    folder: Path,
    quantization: dict[str, Any] | None,
    training: dict[str, Any],
    method: str = "sft",
    data: Path | None = None,
) -> list[float]:
    """The loss of every step of plain TRL: sixteen rows, two epochs, 2 x 4."""
    folder.mkdir()
    skip = {"llm_int8_skip_modules": ["model.vision_model", "model.connector", "lm_head"]}
    spec = {
        "method": method,
        "model": str(resolve_model("demo:smolvlm-tiny")),
        "data": str(data or next(charts().glob("data/train*.parquet"))),
        "rows": 16,
        "order": None,
        "seed": JOB["seed"],
        "device": "cpu",
        "dtype": "float32",
        "quantization": quantization and {**quantization, **skip},
        "processor": {},
        "lora": {**JOB["lora"], "exclude_modules": FROZEN},
        "training": {
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            **training,
        },
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(BENCH), str(folder / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])["losses"]
    return losses
