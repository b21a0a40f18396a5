"""Our SFT step against plain TRL's, at SmolVLM's proportions, side by side in one run.

13 tiles and about 1,120 tokens a row, 729 patches a tile, tower : text layers 1 : 4 in parameters, tower
and projector frozen, LoRA on the text model, gradient checkpointing on (TRL's default), float32.
Both train the same rows in the same order from the same seed in processes of their own, in turn; the
ratio is of the medians of all steps but each process's first. Prints the largest difference of a
step's loss and the peak memory of both.

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

from runner.demo import resolve_model

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


def build_model(folder: Path) -> None:
    """A random model of SmolVLM's shape: widths, depths and vocabulary divided by six."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    demo = resolve_model("demo:smolvlm-tiny")
    config = AutoConfig.from_pretrained(demo)
    vision = {"hidden_size": 192, "intermediate_size": 720, "num_hidden_layers": 4, "num_attention_heads": 3}
    for name, value in {**vision, "image_size": 384, "patch_size": 14}.items():
        setattr(config.vision_config, name, value)
    text = {"hidden_size": 336, "intermediate_size": 1344, "num_hidden_layers": 4, "num_attention_heads": 6}
    text |= {"num_key_value_heads": 6, "head_dim": 56, "vocab_size": 8192, "max_position_embeddings": 4096}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.scale_factor = 3
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(demo, backend="pil").save_pretrained(folder)


def build_rows(file: Path, rows: int) -> None:
    """850 x 600 pictures, which the processor cuts into 13 tiles."""
    from datasets import Dataset, Features, Image, Sequence, Value
    from PIL import Image as Pillow

    pictures = [Pillow.new("RGB", (850, 600), (40 * index % 256, 90, 160)) for index in range(rows)]
    Dataset.from_dict(
        {
            "image": pictures,
            "query": [f"What is the value of bar {index}?" for index in range(rows)],
            "label": [[str(7 * index)] for index in range(rows)],
        },
        features=Features({"image": Image(), "query": Value("string"), "label": Sequence(Value("string"))}),
    ).to_parquet(file)


def ours(folder: Path, model: Path, data: Path, turn: int) -> dict[str, Any]:
    """The runner's own trainer process, as the supervisor starts it."""
    from runner.manifest import Job
    from runner.plan import Fetched, Plan, geometry

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
    run_dir = folder / f"ours-{turn}"
    attempt_dir = run_dir / "attempts" / "1"
    attempt_dir.mkdir(parents=True)
    (run_dir / "outbox").mkdir()
    plan = Plan(
        purpose="train",
        job=job,
        run_dir=run_dir,
        attempt=1,
        attempt_dir=attempt_dir,
        geometry=geometry(job),
        fetched=Fetched(model=str(model), train=[str(data)], eval=[]),
        save_seconds=3600,
    )
    (attempt_dir / "plan.json").write_text(plan.model_dump_json())
    reader, writer = os.pipe()
    with (attempt_dir / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "runner.train", str(attempt_dir / "plan.json")],
            env={**os.environ, "RUNNER_EVENTS_FD": str(writer)},
            pass_fds=[writer],
            stdout=log,
            stderr=log,
        )
        os.close(writer)
        with os.fdopen(reader) as lines:
            events = [json.loads(line) for line in lines]
    if process.wait() != 0:
        sys.exit(f"the runner failed: {(attempt_dir / 'log').read_text()[-2000:]}")
    steps = [event for event in events if event["event"] == "step"]
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
