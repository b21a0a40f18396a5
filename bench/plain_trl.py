"""A short plain TRL script: what the runner is compared with, in tests (losses) and in the bench (speed).

Run as `python bench/plain_trl.py SPEC.json`; prints one JSON object: of every optimizer step the loss, the
seconds, those of them that pass before it begins (data, and the logging of the step before) and its end
(seconds since 1970); the seconds from the beginning of training to the first step; the process's memory and
card. It uses nothing of the runner but the demo's files.

SPEC: method (sft or dpo), model (folder), data (parquet file with image, query, label, or with image,
question, chosen, rejected), rows, order (indices of the rows of each step; null: TRL's own order), seed,
device (cpu or cuda), dtype, quantization (dict or null), lora (dict), training (fields of SFTConfig or
DPOConfig), processor (AutoProcessor keyword arguments).
"""

from __future__ import annotations

import itertools
import json
import os
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
from process_facts import process_facts
from processors import load_processor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

METHODS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


class Clock(TrainerCallback):
    """Seconds of every optimizer step from the end of the one before, those of them before it began, and when
    it ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.data_seconds: list[float] = []
        self.ended: list[float] = []
        self.mark = self.first_step = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        self.first_step = self.first_step or now
        self.data_seconds.append(now - self.mark)

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
    """The first `rows` rows in TRL's form; with an order, as often and as they come in it."""
    source = load_dataset("parquet", data_files=spec["data"], split=f"train[:{spec['rows']}]")
    dataset = Dataset.from_list([conversation(row, spec["method"]) for row in source])
    return dataset if spec["order"] is None else dataset.select(itertools.chain(*spec["order"]))


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as the spec says; see the module's first lines for what comes back."""
    quantization = spec["quantization"] and BitsAndBytesConfig(**spec["quantization"])
    model = AutoModelForImageTextToText.from_pretrained(
        spec["model"],
        dtype=getattr(torch, spec["dtype"]),
        attn_implementation="sdpa",
        quantization_config=quantization,
        device_map={"": "cpu" if spec["device"] == "cpu" else 0},
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
                "use_cpu": spec["device"] == "cpu",
                "train_sampling_strategy": "random" if spec["order"] is None else "sequential",
                "max_length": None,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "logging_steps": 1,
                **spec["training"],
            }
        ),
        train_dataset=rows(spec),
        processing_class=load_processor(Path(spec["model"]), spec["processor"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **spec["lora"]),
        callbacks=[clock],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    began = time.monotonic()
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.seconds,
        "data_seconds": clock.data_seconds,
        "ended": clock.ended,
        "before_seconds": clock.first_step - began,
        "process": process_facts(),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
