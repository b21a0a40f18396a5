"""What a model thinks of pairs of answers: their log-probabilities, as TRL's DPOTrainer computes them.

The forward is the one that trains: TRL's fused head, which projects tile by tile, so that the logits of all
positions never exist at once. It is on the model only while pairs are scored. What the numbers mean is
`runner.train.evaluation.pair_metrics`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from runner.train.data.collator import Batch

NOT_THE_MODELS = ("completion_mask", "row_index", "image_count")
"""What a batch of pairs has beside the arguments of the model's forward."""


@dataclass(frozen=True)
class PairScore:
    """The two answers of a pair under a model."""

    logp_chosen: float
    """Natural logarithm of the answer's probability after its prompt: the sum over its tokens, the end of the
    turn included."""
    logp_rejected: float
    tokens_chosen: int
    """Tokens that the sum is over."""
    tokens_rejected: int


def score(model: torch.nn.Module, batch: Batch) -> list[PairScore]:
    """Score the answers of B pairs, without autograd; the caller chooses modes and autocast.

    Args:
        model: a transformers model, or a PEFT model over one, on its device.
        batch: as `Collator` makes it of pairs: `input_ids`, `attention_mask`, `completion_mask` (2B, T), the
            chosen answers first, and what the processor adds.

    Returns:
        B scores, in the order of the rows.
    """
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in NOT_THE_MODELS
    }
    mask = batch["completion_mask"].to(model.device)
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    with torch.no_grad(), fused_head(model):
        output = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    logps = output.log_probs.float().sum(dim=1)  # zero where no answer is
    columns = [half.tolist() for values in (logps, mask.sum(dim=1)) for half in values.chunk(2)]
    return [PairScore(*values) for values in zip(*columns, strict=True)]


@contextlib.contextmanager
def fused_head(model: torch.nn.Module) -> Iterator[None]:
    """TRL's fused head on the base model inside, and the forward that was there before outside."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = vars(base).get("forward")
    add_fused_lm_head(base)
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before
