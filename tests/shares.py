"""Compares what rows share with the rows one by one, on tiny models of every architecture, in float32.

    python -m tests.shares FOLDER NAME ...

Leaves `FOLDER/<name>.json`: for every case how far log-probabilities are apart, how far gradients are,
relative to the largest of each parameter, and how often the tower ran, plain and shared. Cases are

    pair, questions      two pairs of answers; five questions about two images, and one without a sibling
    once, sequences      the images alone are shared; the rows run as one, too
    frozen, open         tower and projector do not train; they do
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from PIL import Image as Pillow
from trl.trainer.utils import add_fused_lm_head

from runner.manifest import Job
from runner.train import preparation
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.models import model as models
from runner.train.models.architectures import FREEZABLE, parts
from runner.train.models.shared import SharedImages
from tests.tiny_models import save
from tests.trials import ONLY_EAGER

ASKED = ["How many?", "And here, please?", "What colour?", "How many of these?", "And?", "Why?"]
QUESTIONS = [f"Look at this picture well before you say what you see: {asked}" for asked in ASKED]
"""They begin alike, or sequences of them would be more tokens than the rows."""
ANSWERS = ["one", "a pair", "three", "four of them", "five", "because"]
REJECTED = ["none of them", "one", "many", "two", "6", "why not"]
SHOWN = [0, 1, 0, 0, 1, 2]
"""The picture of every row."""
SIZES = [(40, 40), (60, 30), (30, 60)]
FORMATS = {"pair": ("dpo", "preference"), "questions": ("sft", "vqa")}


def data(folder: Path) -> Path:
    """Six rows over three pictures of different shapes."""
    draw = np.random.default_rng(0)
    pictures = [
        Pillow.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in SIZES
    ]
    columns = {
        "image": [pictures[number] for number in SHOWN],
        "question": QUESTIONS,
        "answer": ANSWERS,
        "chosen": ANSWERS,
        "rejected": REJECTED,
    }
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    folder.mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def job(name: str, case: str, freeze: list[str], attention: str) -> Job:
    method, form = FORMATS[case]
    return Job.model_validate(
        {
            "name": "shares",
            "method": method,
            "model": {
                "name_or_path": name,
                "dtype": "float32",
                "freeze": freeze,
                "attn_implementation": attention,
            },
            "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "datasets": {"train": [{"path": "rows", "format": form}]},
        }
    )


class Scored:
    """A model with an adapter that changes something, TRL's head and our hooks."""

    def __init__(self, job: Job, folder: Path) -> None:
        torch.manual_seed(0)
        base = models.load_base(job, str(folder))
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        self.model: PeftModel = models.add_adapter(base, job)
        for path, parameter in self.model.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(parameter, std=0.2)
        self.runs = 0
        where = parts(base.config.model_type)
        first = base.get_submodule(where.vision_tower[0])
        first.register_forward_hook(lambda *_: self._ran())
        self.shared = SharedImages(self.model, frozen=set(FREEZABLE) <= set(job.model.freeze))
        self.model.train()

    def _ran(self) -> None:
        self.runs += 1

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Scores with the adapter off, then on, as dpo does, and the gradients of the second."""
        self.runs = 0
        self.model.zero_grad()
        told = {name: value for name, value in batch.items() if name not in ("row_index", "image_count")}
        mask = told.pop("completion_mask", None)
        if mask is not None:
            told["labels"] = told["input_ids"].masked_fill(mask == 0, -100)
        with self.shared.kept():
            with torch.no_grad(), self.model.disable_adapter():
                reference = self.model(**told, fused_lm_head=True).log_probs
            outputs = self.model(**told, fused_lm_head=True)
        # Every token counts otherwise, so that one in another's place shows.
        weights = torch.arange(1.0, outputs.log_probs.numel() + 1).view_as(outputs.log_probs).sqrt()
        (outputs.log_probs * weights).sum().backward()
        return {
            "log_probs": outputs.log_probs.detach(),
            "reference": reference,
            "mean_logits": outputs.mean_logits,
            "is_top1": outputs.is_top1,
            "label_mask": outputs.label_mask,
            "gradients": {
                path: parameter.grad.clone()
                for path, parameter in self.model.named_parameters()
                if parameter.grad is not None
            },
            "runs": self.runs,
        }


def apart(plain: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """How far two answers are apart; see the module."""
    assert plain["gradients"].keys() == shared["gradients"].keys()
    far = [
        float((one - shared["gradients"][path]).abs().max() / one.abs().max().clamp(min=1e-12))
        for path, one in plain["gradients"].items()
    ]
    found = {
        name: float((plain[name] - shared[name]).abs().max())
        for name in ("log_probs", "reference", "mean_logits")
    }
    same = all(torch.equal(plain[name], shared[name]) for name in ("is_top1", "label_mask"))
    return {**found, "gradients": max(far), "same": same, "runs": [plain["runs"], shared["runs"]]}


def prepared(job: Job, folder: Path, rows_at: Path) -> tuple[Any, Rows]:
    processor = models.load_processor(job, str(folder))
    limit = preparation.token_limit(job, str(folder))
    return processor, preparation.train_rows(job, [str(rows_at)], processor, limit)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Every case of one architecture."""
    model, rows_at = save(name, folder / f"{name}-model"), data(folder / f"{name}-rows")
    attention = "eager" if name in ONLY_EAGER else "sdpa"
    found: dict[str, Any] = {}
    for case, freeze in itertools.product(FORMATS, ("frozen", "open")):
        it = job(name, case, list(FREEZABLE) if freeze == "frozen" else [], attention)
        processor, rows = prepared(it, model, rows_at)
        chosen = [rows.dataset[index] for index in (range(6) if case == "questions" else range(2))]
        scored = Scored(it, model)
        plain = scored(Collator(processor, rows.form, torch.float32)(chosen))
        packs = parts(models.load_config(str(model)).model_type).positions is not None
        for way in ("once", "sequences") if packs else ("once",):
            collate = Collator(
                processor, rows.form, torch.float32, images_once=True, prefixes=way == "sequences"
            )
            batch = collate(chosen)
            sharing = batch.get("sharing")
            told = {"sets": None, "sequences": None}
            if sharing is not None:
                told = {"sets": len(sharing.counts), "sequences": [len(s.rows) for s in sharing.sequences]}
            found[f"{case} {way} {freeze}"] = {**told, **apart(plain, scored(batch))}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for asked in sys.argv[2:]:
        answer = compare(asked, Path(sys.argv[1]))
        Path(sys.argv[1], f"{asked}.json").write_text(json.dumps(answer, indent=1))
