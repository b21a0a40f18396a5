"""Trains tiny models through the real trainer and writes down what happened to their modules and parameters.

    python -m tests.trials FOLDER NAME:METHOD:FREEZE ...        FREEZE: parts joined by +, or nothing

Each trial is two steps of a whole attempt with a 4-bit base, in a process forked after the imports, because
the libraries keep state of their own and importing them takes longer than a trial. It leaves
`FOLDER/<trial>/facts.json`, or a `trial.log` that says why not.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, Features, Image, Value
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image as Pillow

from runner.facts import Question
from runner.manifest import Job
from runner.plan import Fetched, Plan, geometry
from runner.train import preparation, run
from runner.train.channel import Channel
from runner.train.inspect import inspect
from runner.train.models import model as models
from runner.train.models.architectures import parts
from runner.train.savings import savings
from tests.attempts import LIBRARIES
from tests.tiny_models import save

SIZES = [(40, 40), (60, 30), (30, 60), (56, 44)]
ANSWERS = ["one", "a pair", "three", "four of them"]
REJECTED = ["none", "one", "many, I think", "two"]
ONLY_EAGER = ("paligemma",)
"""Gemma 2, PaliGemma 2's text model, caps its attention scores; transformers (5.23) has no sdpa for it."""

FORMATS = {"sft": "vqa", "dpo": "preference"}


def rows(folder: Path) -> Path:
    """Four pictures of different shapes, each with a question, an answer and a worse one."""
    draw = np.random.default_rng(0)
    pictures = [
        Pillow.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES
    ]
    columns = {
        "image": pictures,
        "question": ["How many?", "And here?", "How many of these?", "And?"],
        "answer": ANSWERS,
        "chosen": ANSWERS,
        "rejected": REJECTED,
    }
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def job(name: str, method: str, freeze: list[str]) -> Job:
    source = {"path": "pairs", "format": FORMATS[method]}
    fields: dict[str, Any] = {
        "name": "trial",
        "method": method,
        "model": {
            "name_or_path": "tiny",
            "dtype": "float32",
            "freeze": freeze,
            "attn_implementation": "eager" if name in ONLY_EAGER else "sdpa",
        },
        "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "datasets": {"train": [source], "eval": [source]},
        "training": {
            "global_batch_size": 2,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        },
    }
    if method == "sft":
        fields["evaluation"] = {"max_samples": 2, "max_new_tokens": 2, "baseline": False}
    return Job.model_validate(fields)


class Heard(Channel):
    """Keeps what the trainer told its supervisor of its plan."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        self.plan: dict[str, Any] = {}

    def send(self, event: str, **fields: Any) -> None:
        if event == "plan":
            self.plan = fields


class Watch:
    """Looks at the model right after it got its adapter, and again after training."""

    def __init__(self) -> None:
        self.model: Any = None
        self.before: dict[str, torch.Tensor] = {}
        self.backward: list[str] = []
        self.labels: list[torch.Tensor] = []

    def begin(self, model: Any, job: Job) -> Any:
        self.model = model
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}
        base = model.get_base_model()
        where = parts(base.config.model_type)
        for name, module in base.named_modules():
            if where.part_of(name) in job.model.freeze and not list(module.children()):
                module.register_full_backward_hook(lambda *_, name=name: self.backward.append(name))
        base.register_forward_pre_hook(self._note, with_kwargs=True)
        return model

    def _note(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self.labels.append(kwargs["labels"])

    def facts(self, tokenizer: Any) -> dict[str, Any]:
        base = self.model.get_base_model()
        where = parts(base.config.model_type)
        modules = [
            {
                "path": name,
                "part": where.part_of(name),
                "quantized": isinstance(module, Linear4bit),
                "adapted": isinstance(module, BaseTunerLayer),
            }
            for name, module in base.named_modules()
        ]
        parameters = [
            {
                "path": name,
                "trainable": value.requires_grad,
                "dtype": str(value.dtype),
                "moved": not torch.equal(value.detach(), self.before[name].to(value.dtype)),
            }
            for name, value in self.model.named_parameters()
        ]
        learned = [tokenizer.decode(row[row != -100]) for labels in self.labels for row in labels]
        return {
            "modules": modules,
            "parameters": parameters,
            "backward": self.backward,
            "learned": learned,
        }


def collated(job: Job, fetched: Fetched) -> list[dict[str, int]]:
    """Of every training row: its tokens as a batch of one has them, and those of them that hold an image."""
    processor = models.load_processor(job, fetched.model)
    rows = preparation.train_rows(job, fetched.train, processor, preparation.token_limit(job, fetched.model))
    collate = preparation.collator(job, processor, rows, savings(job, rows, processor, fetched.model))
    found = []
    for row in rows.dataset:
        ids = collate([row])["input_ids"]
        images = int((ids[0] == processor.image_token_id).sum())
        found.append({"tokens": ids.shape[1], "image_tokens": images})
    return found


def trial(folder: Path, name: str, method: str, freeze: list[str]) -> None:
    """One attempt, watched."""
    job_ = job(name, method, freeze)
    model, data = save(name, folder / "model"), rows(folder / "pairs")
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    (folder / "outbox").mkdir()
    plan = Plan(
        purpose="train",
        job=job_,
        run_dir=folder,
        attempt=1,
        attempt_dir=attempt,
        geometry=geometry(job_),
        fetched=Fetched(model=str(model), train=[str(data)], eval=[str(data)]),
        save_seconds=3600,
    )
    planned = inspect(Question(job=job_, fetched=plan.fetched, sample=None))
    watch, heard = Watch(), Heard(attempt)
    adapted = run.adapter.adapted
    run.adapter.adapted = lambda base, it, start: watch.begin(adapted(base, it, start), it)
    outcome = run.train(plan, heard)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    facts = {
        "metrics": outcome["metrics"],
        "parts": outcome["facts"]["parts"],
        "trainable_parameters": outcome["facts"]["trainable_parameters"],
        "weight_bytes": outcome["facts"]["weight_bytes"],
        "plan": heard.plan,
        "planned": planned.model_dump(),
        "collated": collated(job_, plan.fetched),
        **watch.facts(tokenizer),
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def forked(folder: Path, name: str, method: str, freeze: list[str]) -> None:
    """`trial` in a child whose output is a file of its own."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    code = 1
    try:
        log = os.open(folder / "trial.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        trial(folder, name, method, freeze)
        code = 0
    finally:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    for asked in sys.argv[2:]:
        name, method, freeze = asked.split(":")
        forked(Path(sys.argv[1], asked), name, method, [part for part in freeze.split("+") if part])
