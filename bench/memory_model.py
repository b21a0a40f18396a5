"""The memory model against reality: what `runner.memory` predicts, and what a trainer took on a CPU.

Every job is a trainer process of its own, one after the other: two steps, because the optimizer's state is
there from the second on. The models are those of bench/memory_models.py, and the demos with a few steps and
without their evaluation; the facts are found as `runner plan` finds them. Measured is the peak of resident
memory of the process (VmHWM) up to the last step, Python and the libraries included; without them it is the
peak less what the process had before it loaded the model. `--write` keeps each measurement in
tests/data/memory-measurements.jsonl, in place of that case's last one, and puts the table into
docs/memory-model.md. Qwen2-VL's processor needs torchvision, as in `make test`. A CPU that has no products in
bfloat16 makes them as bench/bfloat16_blocks.py does.

Run as `make bench` or `python bench/memory_model.py [--write] [CASE ...]`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["RUNNER_BENCH_BLOCKS"] = "1"

from attempt import build_rows, trainer
from memory import merged
from memory_models import build

from runner import demo
from runner.facts import DataFacts, ModelFacts
from runner.manifest import Job
from runner.memory import Estimate, Subject, estimate
from runner.plan import Fetched, geometry
from runner.settings import resolve

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory-model.md"
BEGIN, END = "<!-- measured: make bench -->", "<!-- end -->"
RECORDS = ROOT / "tests" / "data" / "memory-measurements.jsonl"
COLUMNS = {"question": "query", "answer": "label"}

Changes = dict[str, Any]

BASE: Changes = {
    "name": "bench",
    "seed": 5,
    "model": {"dtype": "bfloat16"},
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "training": {
        "global_batch_size": 2,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "learning_rate": 1e-4,
    },
    "checkpoints": {"max_loss": "1h"},
}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT_BIT = {"load_in_8bit": True}
FULL_FLOAT = {"lora": None, "model": {"dtype": "float32"}}
STORED = {"training": {"gradient_checkpointing": False}}
FOUR_ROWS = {"training": {"global_batch_size": 4, "per_device_train_batch_size": 4}}
FOUR_WAIT = {"training": {"global_batch_size": 4}}
EIGHT_BIT_ADAM = {"training": {"optim": "adamw_bnb_8bit"}}
TOWER = {"model": {"freeze": []}}
DPO = {"method": "dpo"}

CASES: dict[str, tuple[str, list[Changes]]] = {
    "lora": ("idefics3", [FOUR_WAIT]),
    "lora, 4 rows, stored": ("idefics3", [FOUR_ROWS, STORED]),
    "4-bit, 4 rows": ("idefics3", [{"quantization": FOUR_BIT}, FOUR_ROWS]),
    "8-bit, 4 rows, stored": ("idefics3", [{"quantization": EIGHT_BIT}, FOUR_ROWS, STORED]),
    "full float32, 4 rows": ("idefics3", [FULL_FLOAT, FOUR_ROWS]),
    "full float32, 8-bit adamw, stored": ("idefics3", [FULL_FLOAT, EIGHT_BIT_ADAM, STORED, FOUR_WAIT]),
    "qwen 4-bit": ("qwen2_vl", [{"quantization": FOUR_BIT}]),
    "llava 8-bit": ("llava", [{"quantization": EIGHT_BIT}]),
    "dpo": ("idefics3", [DPO]),
    "qwen full, tower too, 4 rows": ("qwen2_vl", [{"lora": None}, TOWER, FOUR_ROWS]),
    "llava lora float32, 4 rows": ("llava", [{"model": {"dtype": "float32"}}, FOUR_ROWS]),
    "lora, tower too, 4 rows": ("idefics3", [TOWER, FOUR_ROWS]),
    "qwen dpo, stored": ("qwen2_vl", [DPO, STORED]),
    "llava dpo, full": ("llava", [DPO, {"lora": None}]),
    "dpo 4-bit, stored": ("idefics3", [DPO, {"quantization": FOUR_BIT}, STORED]),
    "qwen lora, 4 rows, stored": ("qwen2_vl", [FOUR_ROWS, STORED]),
}

DEMOS = ("demo-sft", "demo-dpo")
"""Files of jobs/, measured as they are but for this."""
SHORT = ["training.max_steps=4", "evaluation=null", "datasets.eval=[]", "checkpoints.max_loss=1h"]


def job_of(changes: list[Changes], family: str) -> Job:
    """A case's job."""
    merged_job = BASE
    for change in changes:
        merged_job = merged(merged_job, change)
    rows = {"format": "vqa", "columns": COLUMNS}
    if merged_job.get("method") == "dpo":
        rows = {"format": "preference"}
    place = {
        "model": {"name_or_path": f"bench/{family}"},
        "datasets": {"train": [{"path": "bench/rows.parquet", **rows}]},
    }
    return Job.model_validate(merged(merged_job, place))


def build_pairs(file: Path, rows: int) -> None:
    """The pictures of `build_rows`, with two answers each."""
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(file.with_name("rows.parquet")), split="train")
    pairs = {
        "question": table["query"][:rows],
        "chosen": [labels[0] for labels in table["label"][:rows]],
        "rejected": [f"I think {labels[0]} or so" for labels in table["label"][:rows]],
    }
    pictures = table.select_columns("image").select(range(rows))
    for name, values in pairs.items():
        pictures = pictures.add_column(name, values)
    pictures.to_parquet(file)


def facts(folder: Path, job: Job, model: Path, data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a plan knows of the model and of the rows."""
    from runner.facts import Answer, Question

    question, answer = folder / "question.json", folder / "answer.json"
    fetched = Fetched(model=str(model), train=[str(data)], eval=[])
    question.write_text(Question(job=job, fetched=fetched, sample=None).model_dump_json())
    subprocess.run([sys.executable, "-m", "runner.train.inspect", question, answer], check=True)
    found = Answer.model_validate_json(answer.read_text())
    if found.model is None or found.data is None:
        sys.exit("\n".join(finding.message for finding in found.findings if finding.status == "failed"))
    return found.model.model_dump(), found.data.model_dump()


def made(name: str, models: Path) -> tuple[Job, Path, Path]:
    """A case's job, its model and its rows; `models` is a folder for those that are not there yet."""
    if name in DEMOS:
        job = resolve(str(ROOT / "jobs" / f"{name}.yaml"), SHORT, {}).job
        [source] = job.datasets.train
        return job, demo.resolve_model(job.model.name_or_path), demo.resolve_dataset(source.path, models)
    family, changes = CASES[name]
    job, model = job_of(changes, family), models / family
    if not model.exists():
        build(family, model)
    return job, model, models / ("pairs.parquet" if job.method == "dpo" else "rows.parquet")


def measure(name: str, folder: Path, models: Path) -> dict[str, Any]:
    """One case: a record of tests/data/memory-measurements.jsonl."""
    job, model, data = made(name, models)
    folder.mkdir()
    model_facts, data_facts = facts(folder, job, model, data)
    found = trainer(folder / "run", job, model, data)
    return {
        "case": name,
        "origin": "bench/memory_model.py",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "hardware": f"CPU, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "blocks": found.process["blocks"],
        "versions": found.facts["versions"],
        "job": job.model_dump(mode="json", exclude_unset=True),
        "model": model_facts,
        "data": data_facts,
        "device": "cpu",
        "idle_bytes": found.idle_bytes,
        "peak_bytes": found.steps[-1]["memory_bytes"],
    }


def predicted(record: dict[str, Any]) -> Estimate:
    """What `runner.memory` says of a record's job."""
    job = Job.model_validate(record["job"])
    model, data = ModelFacts.model_validate(record["model"]), DataFacts.model_validate(record["data"])
    return estimate(Subject(model, data, job, geometry(job), "single", record["device"]))


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: a row for every record, and how far off they are in the mean."""
    lines = [
        "| job | model | predicted, MiB | middle | measured, MiB | off | off, above the process |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    off, off_above, inside = [], [], 0
    for record in records:
        said, peak = predicted(record), record["peak_bytes"]
        off.append((said.middle - peak) / peak)
        off_above.append((said.middle - peak) / (peak - record["idle_bytes"]))
        inside += said.low <= peak <= said.high
        low, high, middle, measured = (
            f"{size / 2**20:,.0f}" for size in (said.low, said.high, said.middle, peak)
        )
        lines.append(
            f"| {record['case']} | {record['model']['model_type']} | {low} - {high} | {middle} | {measured} "
            f"| {off[-1]:+.0%} | {off_above[-1]:+.0%} |"
        )
    mean, mean_above = (sum(map(abs, one)) / len(one) for one in (off, off_above))
    lines += [
        "",
        f"{inside} of {len(records)} measured values lie inside the interval. The middle is off by "
        f"{mean:.1%} in the mean; of the part above the process before it loads the model, by "
        f"{mean_above:.1%}.",
    ]
    return lines


def read() -> list[dict[str, Any]]:
    """The measurements that are kept."""
    return [json.loads(line) for line in RECORDS.read_text("utf-8").splitlines()]


def page(text: str, records: list[dict[str, Any]]) -> str:
    """docs/memory-model.md with the table of these records."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *table(records), "", END + after])


def keep(record: dict[str, Any]) -> None:
    """Put a measurement in place of the case's last one, and all of them into the page."""
    by_case = {one["case"]: one for one in read()} | {record["case"]: record}
    records = [by_case[name] for name in (*CASES, *DEMOS) if name in by_case]
    RECORDS.write_text("".join(json.dumps(one) + "\n" for one in records), "utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8"), records), "utf-8")


def main() -> None:
    """Measure and print; with --write, keep the records and the table."""
    write = "--write" in sys.argv[1:]
    names = [name for name in sys.argv[1:] if name != "--write"] or [*CASES, *DEMOS]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        build_rows(models / "rows.parquet", rows=4)
        build_pairs(models / "pairs.parquet", rows=4)
        for number, name in enumerate(names):
            records.append(measure(name, Path(folder) / str(number), models))
            print(table(records[-1:])[2], flush=True)
            if write:
                keep(records[-1])
    print(*table(records), sep="\n")


if __name__ == "__main__":
    main()
