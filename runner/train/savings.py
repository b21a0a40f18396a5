"""Which savings of the job's `speed` are in force, and why the others are not.

saving             in force unless
encode_once        the job says no; rows are conversations of several answers; the processor cannot be told
                   which rows show the same images; dropout in a tower or projector that trains
share_prompt       the job says no; rows are such conversations; the processor cannot be told; the model's
                   attention does not take it (`models.shared.packs`); dropout or NEFTune, of which rows
                   would share the draws
cache_reference    the job says no; the method has no reference; dropout or NEFTune makes it another one
                   every time
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import ProcessorMixin

from runner.manifest import Job
from runner.train.data.once import tells_sets
from runner.train.data.rows import Rows
from runner.train.models import model as models
from runner.train.models.architectures import FREEZABLE
from runner.train.models.shared import packs

OFF = "speed says no"


@dataclass(frozen=True)
class Savings:
    """Of each: None where it is in force, else why not."""

    encode_once: str | None
    share_prompt: str | None
    cache_reference: str | None

    def told(self) -> dict[str, str | None]:
        """By key, for records and plans."""
        return asdict(self)


def savings(job: Job, rows: Rows, processor: ProcessorMixin, folder: str) -> Savings:
    """What is in force for a job.

    Args:
        rows: the training rows.
        folder: where the model lies.
    """
    apart = _apart(rows, processor)
    return Savings(
        encode_once=_first(not job.speed.encode_once and OFF, apart, _draws_in_tower(job)),
        share_prompt=_first(
            not job.speed.share_prompt and OFF,
            apart,
            packs(models.load_config(folder), job.model.attn_implementation, rows.max_tokens),
            _draws(job),
        ),
        cache_reference=_first(
            job.method != "dpo" and f"method {job.method} has no reference",
            not job.speed.cache_reference and OFF,
            _reference_draws(job),
        ),
    )


def _first(*reasons: Any) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _apart(rows: Rows, processor: ProcessorMixin) -> str | None:
    """Why rows are not known to share anything."""
    if rows.form == "messages":
        return "the rows are conversations of several answers"
    if rows.form == "prompt_completion" and not tells_sets(processor):
        return f"{type(processor).__name__} cannot be told which rows show the same images"
    return None


def _keeps_dropout(job: Job) -> bool:
    """Whether dropout is drawn in training; TRL's dpo switches it off unless asked not to."""
    return job.method == "sft" or not job.training.options.get("disable_dropout", True)


def _reference_draws(job: Job) -> str | None:
    """What makes a reference of the same rows another one: its forward is one of the model in training."""
    again = "makes the reference another one every time"
    if _keeps_dropout(job):
        return f"training.disable_dropout: false {again}"
    if job.training.options.get("neftune_noise_alpha"):
        return f"training.neftune_noise_alpha {again}"
    return None


def _draws(job: Job) -> str | None:
    """What is drawn for every token of the text model."""
    if job.training.options.get("neftune_noise_alpha"):
        return "training.neftune_noise_alpha: rows would share its noise"
    dropout = (job.lora or {}).get("lora_dropout", 0.0)
    if dropout and _keeps_dropout(job):
        return f"lora.lora_dropout {dropout}: rows would share its draws; 0 shares the prompt"
    return None


def _draws_in_tower(job: Job) -> str | None:
    return None if set(FREEZABLE) <= set(job.model.freeze) else _draws(job)
