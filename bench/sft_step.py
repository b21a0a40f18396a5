"""Our SFT step against plain TRL's, at SmolVLM's proportions, side by side in one run.

13 tiles and about 1,120 tokens a row, 729 patches a tile, tower : text layers 1 : 4 in parameters, tower
and projector frozen, LoRA on the text model, gradient checkpointing on (TRL's default), float32.
Both train the same rows in the same order from the same seed in processes of their own, in turn; the
ratio is of the medians of all steps but each process's first. Prints the largest difference of a
step's loss and the peak memory of both. Part of the ratio belongs to CPUs: on a GPU, TRL
too projects only the tokens that carry loss through the head.

Run as `make bench` or `python bench/sft_step.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for both, as the supervisor sets it for trainers

from attempt import build_model, build_rows, trainer

from runner.manifest import Job

ROUNDS = 3
STEPS = 4
SEED = 5
PROCESSOR: dict[str, Any] = {
    "size": {"longest_edge": 4 * 384},
    "max_image_size": {"longest_edge": 384},
    "do_image_splitting": True,
    "image_seq_len": 81,
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
TRAINING = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "gradient_checkpointing": True,
    "dataloader_num_workers": 0,
}


def ours(folder: Path, model: Path, data: Path, turn: int) -> dict[str, Any]:
    """The runner's own trainer process, as the supervisor starts it."""
    job = Job.model_validate(
        {
            "name": "bench",
            "method": "sft",
            "seed": SEED,
            "model": {"name_or_path": str(model), "dtype": "float32", "processor": PROCESSOR},
            "lora": {**LORA, "target_modules": "all-linear"},
            "datasets": {
                "train": [
                    {"path": str(data), "format": "vqa", "columns": {"question": "query", "answer": "label"}}
                ]
            },
            "training": {**TRAINING, "global_batch_size": 1, "per_device_train_batch_size": 1},
            "checkpoints": {"max_loss": "1h"},
        }
    )
    steps = trainer(folder / f"ours-{turn}", job, model, data).steps
    return {
        "losses": [step["loss"] for step in steps],
        "seconds": [step["seconds"] for step in steps],
        "peak_bytes": steps[-1]["memory_bytes"],
    }


def plain(folder: Path, model: Path, data: Path, rows: int) -> dict[str, Any]:
    """`bench/plain_trl.py` with the same values, its adapter on the same modules."""
    spec = {
        "method": "sft",
        "model": str(model),
        "data": str(data),
        "rows": rows,
        "seed": SEED,
        "dtype": "float32",
        "quantization": None,
        "processor": PROCESSOR,
        "lora": {
            **LORA,
            "target_modules": "all-linear",
            "exclude_modules": r"model\.(vision_model|connector)(\..*)?",
        },
        "training": {**TRAINING, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    }
    file = folder / "plain.json"
    file.write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_trl.py")), str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    if done.returncode != 0:
        sys.exit(f"plain TRL failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print; exit 1 when the losses differ by more than 1e-5."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = folder / "model", folder / "rows.parquet"
        build_model(model)
        build_rows(data, rows=STEPS)
        results: dict[str, list[dict[str, Any]]] = {"ours": [], "plain TRL": []}
        for turn in range(ROUNDS):
            results["ours"].append(ours(folder, model, data, turn))
            results["plain TRL"].append(plain(folder, model, data, STEPS))
    medians = {}
    for label, runs in results.items():
        medians[label] = statistics.median(second for run in runs for second in run["seconds"][1:])
        peak = max(run["peak_bytes"] for run in runs) / 2**30
        print(f"{label:10}  median step {medians[label]:6.2f} s   peak memory {peak:5.2f} GiB")
    pairs = zip(results["ours"], results["plain TRL"], strict=True)
    worst = max(
        abs(a - b) for one, other in pairs for a, b in zip(one["losses"], other["losses"], strict=True)
    )
    ratio = medians["plain TRL"] / medians["ours"]
    print(f"{'ratio':10}  {ratio:.2f} times faster; largest difference of a step's loss {worst:.1e}")
    if worst > 1e-5:
        sys.exit("the losses differ by more than 1e-5")


if __name__ == "__main__":
    main()
