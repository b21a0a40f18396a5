"""Which savings of the job's `speed` are in force, and why the others are not.

saving             in force unless
encode_once        the job says no
share_prompt       the job says no; the model's attention does not take it (`models.shared.packs`); the
                   rows are conversations, which carry loss in every turn
cache_reference    the job says no; the method has no reference; dropout makes it another one every time
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from runner.manifest import Job
from runner.train.data.rows import Rows
from runner.train.models import model as models
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


def savings(job: Job, rows: Rows, folder: str) -> Savings:
    """What is in force for a job.

    Args:
        rows: the training rows.
        folder: where the model lies.
    """
    once = prompts = cached = None
    if rows.form == "messages":
        once = prompts = "the rows are conversations of several answers"
    if not job.speed.encode_once:
        once = OFF
    if not job.speed.share_prompt:
        prompts = OFF
    elif prompts is None:
        prompts = packs(models.load_config(folder), job.model.attn_implementation, rows.max_tokens)
    if job.method != "dpo":
        cached = f"method {job.method} has no reference"
    elif not job.speed.cache_reference:
        cached = OFF
    elif not job.training.options.get("disable_dropout", True):
        cached = "training.disable_dropout: false makes the reference another one every time"
    return Savings(once, prompts, cached)
