"""Generation that keeps what a model thought of each token of its answers, to compare it with another's.

A `Listener` stands in for `runner.train.evaluation.evaluate`'s own generation: the same prompts in the same
batches, so that two models differ by nothing but their weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, ProcessorMixin

from runner.export.likeness import LOOKED_AT, Step, Steps
from runner.train.data.collator import Batch
from runner.train.evaluation.evaluate import arguments, as_texts


class Listener:
    """Collects the steps of every answer, in the order of the rows.

    Args:
        against: answers of another model to the same rows, whose tokens are looked at here.
    """

    def __init__(self, against: Sequence[Steps] = ()) -> None:
        self._against = against
        self.heard: list[Steps] = []

    def __call__(
        self, model: torch.nn.Module, processor: ProcessorMixin, prompts: Batch, config: GenerationConfig
    ) -> list[str]:
        """The answers to a batch of prompts, as texts."""
        inputs = arguments(model, prompts)
        config = copy.copy(config)
        config.return_dict_in_generate = config.output_logits = True
        output = model.generate(**inputs, generation_config=config)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        ends = set(config.eos_token_id)
        for row, tokens in enumerate(answers.tolist()):
            length = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
            other = self._against[len(self.heard)] if self._against else ()
            self.heard.append(
                tuple(
                    _step(tokens[n], output.logits[n][row], other[n].ids if n < len(other) else None)
                    for n in range(length)
                )
            )
        return as_texts(processor, answers)


def _step(token: int, logits: torch.Tensor, ids: Sequence[int] | None) -> Step:
    """
    Args:
        logits: (V,), of the whole vocabulary.
        ids: tokens to look at; None: the likeliest.
    """
    row = logits.float()
    looked_at = row.topk(min(LOOKED_AT, len(row))).indices.tolist() if ids is None else list(ids)
    return Step(
        token=token, ids=tuple(looked_at), logits=tuple(row[looked_at].tolist()), scale=row.abs().max().item()
    )
