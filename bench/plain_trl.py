"""A short plain TRL script: what the runner is compared with, in tests (losses) and in the bench (speed).

Run as `python bench/plain_trl.py SPEC.json`; prints one JSON object: the loss, the seconds and the end (in
seconds since 1970) of every optimizer step, and the peak resident memory in bytes. It uses nothing of the
runner but the demo's files.

SPEC: method (sft or dpo), model (folder), data (parquet file with image, query, label, or with image,
question, chosen, rejected), rows, seed, dtype, quantization (dict or null), lora (dict), training (fields of
SFTConfig or DPOConfig), processor (AutoProcessor keyword arguments).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

METHODS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


class Clock(TrainerCallback):
    """Seconds of every optimizer step, from the end of the one before, and when it ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ended: list[float] = []
        self.mark = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        self.seconds.append(now - self.mark)
        self.ended.append(time.time())
        self.mark = now


def said(text: str) -> list[dict[str, Any]]:
    """One assistant message."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def conversation(row: dict[str, Any], method: str) -> dict[str, Any]:
    """One row as TRL's prompt and completion, or as its prompt, chosen and rejected."""
    question = row["query"] if method == "sft" else row["question"]
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if method == "sft":
        answers = {"completion": said(row["label"][0])}
    else:
        answers = {"chosen": said(row["chosen"]), "rejected": said(row["rejected"])}
    return {"prompt": prompt, **answers, "images": [row["image"]]}


def rows(spec: dict[str, Any]) -> Dataset:
    """The first `rows` rows in TRL's form."""
    source = load_dataset("parquet", data_files=spec["data"], split=f"train[:{spec['rows']}]")
    return Dataset.from_list([conversation(row, spec["method"]) for row in source])


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as the spec says; see the module's first lines for what comes back."""
    quantization = spec["quantization"] and BitsAndBytesConfig(**spec["quantization"])
    model = AutoModelForImageTextToText.from_pretrained(
        spec["model"],
        dtype=getattr(torch, spec["dtype"]),
        attn_implementation="sdpa",
        quantization_config=quantization,
        device_map={"": "cpu"},
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    clock = Clock()
    trainer_class, config_class = METHODS[spec["method"]]
    trainer = trainer_class(
        model=model,
        args=config_class(
            **{
                "output_dir": "unused",
                "seed": spec["seed"],
                "bf16": spec["dtype"] == "bfloat16",
                "use_cpu": True,
                "max_length": None,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "logging_steps": 1,
                **spec["training"],
            }
        ),
        train_dataset=rows(spec),
        processing_class=AutoProcessor.from_pretrained(spec["model"], backend="pil", **spec["processor"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **spec["lora"]),
        callbacks=[clock],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.seconds,
        "ended": clock.ended,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
