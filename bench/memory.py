"""The memory ladder: what each rung of a job costs and saves, measured in one run.

Every row is a trainer process of its own on the same rows: its peak, above what it took before it loaded the
model (on a GPU: peak allocated). The rungs of the ladder are taken one after the other and kept; the rows
below it change one thing about the rung that they name. A random model in SmolVLM's shape with a wider text
model, so that weights weigh something; two steps of 4 rows with 5 tiles each, because optimizer state is
there from the second on. `--write` puts the table into docs/memory.md.

Run as `make bench` or `python bench/memory.py [--write]`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from attempt import Measured, build_model, build_rows, trainer

from runner.manifest import Job

TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
TEXT |= {"num_key_value_heads": 12, "head_dim": 64}
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- measured: make bench -->", "<!-- end -->"

Changes = dict[str, Any]

FIRST: Changes = {
    "model": {
        "dtype": "float32",
        "freeze": [],
        "processor": {
            "size": {"longest_edge": 2 * 384},
            "max_image_size": {"longest_edge": 384},
            "do_image_splitting": True,
            "image_seq_len": 81,
        },
    },
    "training": {
        "global_batch_size": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
    },
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

LADDER: list[tuple[str, str, Changes]] = [
    ("everything trains, float32", "`lora: null`, `model.dtype: float32`", {}),
    ("LoRA", "`lora: {r: 16}`", {"lora": LORA}),
    ("bfloat16", "`model.dtype: bfloat16`", {"model": {"dtype": "bfloat16"}}),
    ("8-bit weights", "`quantization: {load_in_8bit: true}`", {"quantization": {"load_in_8bit": True}}),
    ("4-bit weights, nf4", "`quantization: {load_in_4bit: true}`", {"quantization": FOUR_BIT}),
    (
        "double quantization",
        "`bnb_4bit_use_double_quant: true`",
        {"quantization": {**FOUR_BIT, "bnb_4bit_use_double_quant": True}},
    ),
    (
        "tower and projector frozen",
        "`model.freeze: [vision_tower, projector]`",
        {"model": {"freeze": ["vision_tower", "projector"]}},
    ),
    (
        "gradient checkpointing",
        "`training.gradient_checkpointing: true`",
        {"training": {"gradient_checkpointing": True}},
    ),
    (
        "accumulation: 2 x 2 rows",
        "`training.per_device_train_batch_size: 2`",
        {"training": {"per_device_train_batch_size": 2}},
    ),
    (
        "accumulation: 4 x 1 row",
        "`training.per_device_train_batch_size: 1`",
        {"training": {"per_device_train_batch_size": 1}},
    ),
    (
        "one tile an image",
        "`model.processor: {size: {longest_edge: 384}}`",
        {"model": {"processor": {"size": {"longest_edge": 384}}}},
    ),
]
"""Name, the job's key, and what it changes about the rung before."""

BESIDE: list[tuple[str, str, str, Changes]] = [
    ("8-bit AdamW", "`training.optim: adamw_bnb_8bit`", "everything trains, float32",
     {"training": {"optim": "adamw_bnb_8bit"}}),
    ("paged 8-bit AdamW", "`training.optim: paged_adamw_8bit`", "everything trains, float32",
     {"training": {"optim": "paged_adamw_8bit"}}),
    ("4-bit weights, fp4", "`bnb_4bit_quant_type: fp4`", "4-bit weights, nf4",
     {"quantization": {**FOUR_BIT, "bnb_4bit_quant_type": "fp4"}}),
    ("rsLoRA", "`lora: {use_rslora: true}`", "double quantization", {"lora": {**LORA, "use_rslora": True}}),
    ("DoRA", "`lora: {use_dora: true}`", "double quantization", {"lora": {**LORA, "use_dora": True}}),
]  # fmt: skip
"""Name, the job's key, the rung that it is beside, and what it changes about it."""


def merged(base: Changes, changes: Changes) -> Changes:
    """A copy of nested mappings with `changes` laid over; sections of upstream's keys are replaced whole."""
    result = dict(base)
    for key, value in changes.items():
        both = (
            isinstance(value, dict)
            and isinstance(result.get(key), dict)
            and key not in ("lora", "quantization")
        )
        result[key] = merged(result[key], value) if both else value
    return result


def measure(folder: Path, changes: Changes, model: Path, data: Path) -> tuple[float, float]:
    """MiB of the base model's weights, and at the peak above the idle trainer."""
    columns = {"question": "query", "answer": "label"}
    job = Job.model_validate(
        merged(
            {
                "name": "bench",
                "seed": 5,
                "model": {"name_or_path": str(model)},
                "datasets": {"train": [{"path": str(data), "format": "vqa", "columns": columns}]},
                "checkpoints": {"max_loss": "1h"},
            },
            changes,
        )
    )
    found: Measured = trainer(folder, job, model, data)
    on_gpu = str(found.facts["device"]).startswith("cuda")
    peak = found.steps[-1]["memory_bytes"] - (0 if on_gpu else found.idle_bytes)
    return found.facts["weight_bytes"] / 2**20, peak / 2**20


def table(folder: Path) -> list[str]:
    """Measure every row; Markdown."""
    model, data = folder / "model", folder / "rows.parquet"
    build_model(model, TEXT)
    build_rows(data, rows=4)
    lines = ["| rung | the job's key | weights, MiB | peak, MiB | of the first |", "|---|---|---:|---:|---:|"]
    at: dict[str, Changes] = {}
    current, first = FIRST, 0.0
    for number, (name, key, changes) in enumerate(LADDER):
        current = at[name] = merged(current, changes)
        weights, peak = measure(folder / str(number), current, model, data)
        first = first or peak
        lines.append(f"| {name} | {key} | {weights:,.0f} | {peak:,.0f} | {100 * peak / first:.0f} % |")
        print(lines[-1], flush=True)
    for number, (name, key, beside, changes) in enumerate(BESIDE):
        weights, peak = measure(folder / f"beside-{number}", merged(at[beside], changes), model, data)
        share = f"{100 * peak / first:.0f} %"
        lines.append(f"| {name}, beside *{beside}* | {key} | {weights:,.0f} | {peak:,.0f} | {share} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the table; with --write, keep it in the docs."""
    with tempfile.TemporaryDirectory() as name:
        lines = table(Path(name))
    if "--write" in sys.argv[1:]:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), "utf-8")


if __name__ == "__main__":
    main()
