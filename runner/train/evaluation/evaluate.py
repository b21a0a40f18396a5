"""Evaluation by generation: the training prompts, greedy answers, a verdict for every one.

Rows that are pairs of answers are also scored: how likely the model finds each of the two. `evaluate` leaves
no trace: random generators, training modes, caches and weights are as they were. It runs in the precision of
the autocast context that the caller is in, which is the one of training. What right means is
`metrics`' and, for pairs, `pair_metrics`'s; where results are written is the caller's.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import GenerationConfig, ProcessorMixin

from runner.manifest import Evaluation as Spec
from runner.train import rng
from runner.train.data.collator import Batch, Collator, Row
from runner.train.data.messages import words
from runner.train.data.rows import Rows
from runner.train.evaluation import pair_metrics
from runner.train.evaluation.metrics import Summary, exact_match, relaxed_accuracy, summarize
from runner.train.evaluation.pairs import NOT_THE_MODELS, PairScore, score
from runner.train.world import from_all, from_first, world

LOADERS_BESIDE_A_GPU = 4
"""Processes that decode images while a GPU generates. On a CPU they would take the cores that generate."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: Summary
    """As `metrics.summarize` returns it, or `pair_metrics.summarize`."""
    records: tuple[dict[str, Any], ...]
    """One a row, in order, ready for JSON: row, question, prediction, group (str or null) and

        one answer   answers, relaxed_accuracy and exact_match (bool)
        a pair       chosen, rejected, nearer, logp_chosen, logp_rejected, tokens_chosen, tokens_rejected,
                     reference_logp_chosen, reference_logp_rejected
    """


@dataclass(frozen=True)
class Reference:
    """What the answers of pairs are rewarded against."""

    beta: float
    """Of the training."""
    records: Sequence[Mapping[str, Any]]
    """What `Evaluation.records` holds of the pairs. Rows may be missing."""

    @functools.cached_property
    def _by_texts(self) -> dict[tuple[str, ...], Mapping[str, Any]]:
        return {tuple(record[name] for name in _ASKED): record for record in self.records}

    def of(self, asked: Mapping[str, str]) -> Mapping[str, Any]:
        """The record of a pair, empty if there is none or it was of other texts. Two sources may have rows
        of one name."""
        return self._by_texts.get(tuple(asked[name] for name in _ASKED), {})


Answer = Callable[[torch.nn.Module, ProcessorMixin, Batch, GenerationConfig], list[str]]
"""A model, its processor, prompts and how to generate -> the answers."""

_ASKED = ("row", "question", "chosen", "rejected")
"""What tells a pair from others."""


def evaluate(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    rows: Rows,
    spec: Spec,
    *,
    reference: Reference | None = None,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
    answer: Answer | None = None,
) -> Evaluation | None:
    """Generate an answer for every row and judge it; of a pair, score both answers, too.

    Collective: every rank has its share of the rows, and returns all of them.

    Args:
        model: a transformers model, or a PEFT model over one, on its device.
        spec: `batch_size` rows at once, `max_new_tokens` each.
        reference: of pairs; without one there are no rewards.
        on_progress: told rows done and rows in all, after every batch.
        should_stop: asked before every batch.
        answer: generates in place of this module's own, as `runner.train.listening` does.

    Returns:
        Metrics and records; None if `should_stop` said so.
    """
    total = len(rows.dataset)
    size = world().size
    # Every rank has as many, because a forward may need all ranks; what is too much is dropped.
    mine = [number % total for number in range(world().rank, -(-total // size) * size, size)]
    found: list[dict[str, Any]] = []
    paired = rows.form == "preference"
    collator = Collator(processor, "preference" if paired else "prompt_completion", model.dtype)
    with rng.preserved(), evaluation_mode(model), torch.no_grad():
        config = greedy(model, processor, spec.max_new_tokens)
        for examples, prompts, answers in _loader(rows, mine, collator, spec.batch_size, model.device):
            if from_first(should_stop()):
                return None
            predictions = (answer or _generate)(model, processor, prompts, config)
            if answers is None:
                found += [_record(row, said) for row, said in zip(examples, predictions, strict=True)]
            else:
                judged = zip(examples, predictions, score(model, answers), strict=True)
                found += [_pair_record(row, said, scored, reference) for row, said, scored in judged]
            on_progress(min(len(found) * size, total), total)
    records = [record for turn in zip(*from_all(found), strict=True) for record in turn][:total]
    if paired:
        return Evaluation(
            pair_metrics.summarize(records, None if reference is None else reference.beta), tuple(records)
        )
    return Evaluation(summarize(records), tuple(records))


def greedy(model: torch.nn.Module, processor: ProcessorMixin, max_new_tokens: int) -> GenerationConfig:
    """One answer, the likeliest token at every place, whatever the model's own configuration says.

    Every switch that would bend greedy decoding is set to its neutral value: transformers fills what is not
    set from the model's configuration. It ends at the model's end tokens and at the tokenizer's, which is the
    one that chat templates teach.
    """
    given = model.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        min_p=None,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        min_new_tokens=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(end for end in ends if end is not None),
        pad_token_id=processor.tokenizer.pad_token_id,
    )


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and each back in the mode that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _Batches:
    """Rows -> themselves without images, the prompts and, of pairs, the answers; a class, because it is sent
    to the loader's processes."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, rows: list[Row]) -> tuple[list[Row], Batch, Batch | None]:
        texts: list[Row] = [{name: value for name, value in row.items() if name != "images"} for row in rows]
        answers = self._collator(rows) if self._collator.form == "preference" else None
        return texts, self._collator.prompts(rows), answers


def _loader(
    rows: Rows, numbers: list[int], collator: Collator, batch_size: int, device: torch.device
) -> DataLoader[tuple[list[Row], Batch, Batch | None]]:
    workers = 0 if device.type == "cpu" else min(LOADERS_BESIDE_A_GPU, os.cpu_count() or 1)
    return DataLoader(
        rows.dataset.select(numbers),
        batch_size=batch_size,
        shuffle=False,
        num_workers=workers,
        collate_fn=_Batches(collator),
        generator=torch.Generator(),  # a loader draws a seed from it, even without shuffling
    )


def _generate(
    model: torch.nn.Module, processor: ProcessorMixin, batch: Mapping[str, Any], config: GenerationConfig
) -> list[str]:
    """The answers to a batch of prompts, without special tokens and the space around."""
    inputs = arguments(model, batch)
    # transformers (5.23) sees it only of models that it has sharded itself: a rank whose answers are shorter
    # would leave the others waiting.
    more = {"synced_gpus": True} if isinstance(model, FSDPModule) else {}
    output = model.generate(**inputs, generation_config=config, **more)
    return as_texts(processor, output[:, inputs["input_ids"].shape[1] :])


def arguments(model: torch.nn.Module, batch: Mapping[str, Any]) -> Batch:
    """What a model's forward takes of a batch, on its device."""
    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in NOT_THE_MODELS
    }


def as_texts(processor: ProcessorMixin, answers: torch.Tensor) -> list[str]:
    """Generated tokens, (B, T), as texts without special tokens and the space around."""
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


def _record(row: Row, prediction: str) -> dict[str, Any]:
    answers = list(row["answers"])
    return {
        "row": row["row"],
        "question": row["question"],
        "answers": answers,
        "prediction": prediction,
        "relaxed_accuracy": relaxed_accuracy(prediction, answers),
        "exact_match": exact_match(prediction, answers),
        "group": row["group"],
    }


def _pair_record(row: Row, prediction: str, scored: PairScore, reference: Reference | None) -> dict[str, Any]:
    chosen, rejected = (words(row[name][0]) for name in ("chosen", "rejected"))
    asked = {"row": row["row"], "question": row["question"], "chosen": chosen, "rejected": rejected}
    before = {} if reference is None else reference.of(asked)
    return {
        **asked,
        "prediction": prediction,
        "nearer": pair_metrics.nearer(prediction, chosen, rejected),
        **asdict(scored),
        "reference_logp_chosen": before.get("logp_chosen"),
        "reference_logp_rejected": before.get("logp_rejected"),
        "group": row["group"],
    }
