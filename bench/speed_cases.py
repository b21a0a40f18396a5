"""What the speed bench compares: the cases, the variants of each, and both sides' settings of one of them.

    case    rows                                 micro-batch   epochs
    sft     one question an image                1 row         1
    sft4    four questions an image, by_image    4 rows        1
    dpo     one pair an image                    1 pair        2; the table shows the second by itself, too

    variant             what trains
    plain TRL           bench/plain_trl.py
    frozen parts alone  ours with all of `speed` off: the tower and the projector run without autograd
    a lever             the same and this lever
    all                 ours with all of `speed` on, as it is unless a job says otherwise
    liger, compile      on a GPU: the same as frozen parts alone, and TRL's own option

No dropout, a constant learning rate, gradient checkpointing as TRL has it by default.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_models import Model

from runner.manifest import Job

SEED = 5
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
PLAIN = "plain TRL"
OFF = "frozen parts alone"
ALL = "all"


@dataclass(frozen=True)
class Variant:
    """Our side of one row of the table."""

    name: str
    speed: dict[str, bool]
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TRL's configuration beyond the common ones."""
    package: str | None = None
    """What has to be installed for it."""

    @property
    def missing(self) -> bool:
        return self.package is not None and importlib.util.find_spec(self.package) is None


@dataclass(frozen=True)
class Case:
    """One kind of training."""

    name: str
    method: str
    steps: int
    """Optimizer steps on a CPU unless the command says another number; whole epochs."""
    levers: tuple[str, ...]
    """Keys of `speed` that have something to do here."""
    questions: int = 1
    """Rows of an image, which is also the micro-batch and the global batch."""
    order: str = "shuffled"
    epochs: int = 1

    def usual_steps(self, device: str) -> int:
        """Twice as many on a GPU, where a process takes longer to begin than to train."""
        return self.steps if device == "cpu" else 2 * self.steps

    def images(self, steps: int) -> int:
        """Pictures for so many steps.

        Raises:
            SystemExit: they are no whole epochs.
        """
        if steps < 1 or steps % self.epochs:
            raise SystemExit(f"{self.name}: {steps} steps are not {self.epochs} whole epochs")
        return steps // self.epochs

    def variants(self, device: str) -> list[Variant]:
        """Ours, what a table needs most first, for where time runs out."""
        off = dict.fromkeys(("encode_once", "share_prompt", "cache_reference"), False)
        alone = [Variant(name, {**off, name: True}) for name in self.levers]
        if device != "cpu":
            alone += [
                Variant("use_liger_kernel", off, {"use_liger_kernel": True}, "liger_kernel"),
                Variant("torch_compile", off, {"torch_compile": True}, "triton"),
            ]
        return [Variant(ALL, dict.fromkeys(off, True)), Variant(OFF, off), *alone]


CASES = {
    case.name: case
    for case in (
        Case("sft", "sft", 6, ()),
        Case("sft4", "sft", 3, ("encode_once", "share_prompt"), questions=4, order="by_image"),
        Case("dpo", "dpo", 6, ("encode_once", "share_prompt", "cache_reference"), epochs=2),
    )
}

FORMATS = {
    "sft": {"format": "vqa", "columns": {"question": "query", "answer": "label"}},
    "dpo": {"format": "preference"},
}


def _training(case: Case, steps: int) -> dict[str, Any]:
    """What both sides' configurations say."""
    return {
        "max_steps": steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": case.questions,
    }


def job(case: Case, variant: Variant, model: Model, steps: int, folder: Path, data: Path) -> Job:
    """Ours."""
    return Job.model_validate(
        {
            "name": "bench",
            "method": case.method,
            "seed": SEED,
            "model": {"name_or_path": str(folder), "dtype": model.dtype, "processor": model.processor},
            "quantization": model.quantization,
            "lora": LORA,
            "datasets": {"train": [{"path": str(data), **FORMATS[case.method]}], "order": case.order},
            "training": {**_training(case, steps), "global_batch_size": case.questions, **variant.training},
            "speed": variant.speed,
            "checkpoints": {"max_loss": "1h"},
        }
    )


def spec(
    case: Case, model: Model, steps: int, folder: Path, data: Path, order: list[list[int]], device: str
) -> dict[str, Any]:
    """Plain TRL's: the same values, its adapter on the same modules, the same rows in every step.

    Args:
        order: rows of each step, as our run took them.
    """
    packed = model.quantization and {**model.quantization, "llm_int8_skip_modules": model.unpacked}
    return {
        "method": case.method,
        "model": str(folder),
        "data": str(data),
        "rows": case.images(steps) * case.questions,
        "order": order,
        "seed": SEED,
        "device": device,
        "dtype": model.dtype,
        "quantization": packed,
        "processor": model.processor,
        "lora": {**LORA, "exclude_modules": model.frozen},
        "training": {**_training(case, steps), "gradient_accumulation_steps": 1},
    }
