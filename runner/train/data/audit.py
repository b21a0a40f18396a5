"""The label audit: before step 1, decode what really carries loss and refuse what must not.

`audit` sends a few rows through the collator that training uses and looks at what comes out: an answer must
carry loss, once for every assistant turn, and of a pair the chosen and the rejected one; an image token,
padding, or anything that stands before the answer, must not. That no row has an empty answer was checked on
all rows (`runner.train.data.formats`). It changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from runner.errors import DataError
from runner.train.data.collator import Collator, Row
from runner.train.data.messages import words
from runner.train.data.rows import Rows
from runner.train.data.tokens import REFUSALS

SHOWN_CHARACTERS = 60
"""How much of a prompt's end and of an answer a line shows."""

NO_LOSS = -100


def audit(rows: Rows, collator: Collator, processor: ProcessorMixin, samples: int = 3) -> list[str]:
    """Check the labels of rows spread evenly over the dataset.

    Args:
        collator: the one that training gets.
        samples: rows to look at.

    Returns:
        Lines to print: for each row its name, its tokens, the end of its prompt and what carries loss; for a
        pair both answers.

    Raises:
        DataError: labels that are wrong, or rows with and without images that do not go into one batch. All
            at once.
    """
    count = len(rows.dataset)
    looks = min(samples, count)
    positions = sorted({round(step * (count - 1) / max(1, looks - 1)) for step in range(looks)})
    lines = [f"label audit: {len(positions)} of {count:,} rows"]
    problems: list[str] = []
    for position in positions:
        row = rows.dataset[position]
        sequences = _sequences(row, collator)
        for sequence in sequences:
            which = f"{sequence.half}: " if sequence.half else ""
            problems += [
                f"{row['row']}: {which}{reason}" for reason in _wrong(row, sequence, collator, processor)
            ]
        lines += _described(row, sequences, processor)
    problems += _mixed(rows, collator)
    if problems:
        raise DataError(
            "the labels are wrong, so training would teach the wrong thing:"
            + "".join(f"\n  {problem}" for problem in problems)
            + "\n  remedy: repair the model's chat template or the rows"
        )
    if rows.form == "messages" and not _stops(processor, collator):
        lines.append("warning: the end of a turn carries no loss, so the model may not learn to stop")
    return lines


@dataclass(frozen=True)
class _Span:
    """A run of tokens that carry loss: ids[start:stop]."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Sequence:
    """What the collator made of a row, or of one half of a pair; T tokens."""

    half: str | None
    """`chosen` or `rejected`; None where there is one sequence."""
    messages: list[Any]
    answers: list[int]
    """Which messages carry loss."""
    ids: torch.Tensor
    """int64 (T,), as `labels`: what is learned where `learned`, bool (T,), says that there is loss."""
    labels: torch.Tensor
    learned: torch.Tensor
    attended: torch.Tensor
    """int64 (T,): 0 for padding."""
    spans: list[_Span]
    """Where `learned` is true."""


def _sequences(row: Row, collator: Collator) -> list[_Sequence]:
    batch = collator([row])
    halves: dict[str | None, list[Any]]
    if "chosen" in row:
        halves = {half: [*row["prompt"], *row[half]] for half in ("chosen", "rejected")}
        # TRL's loss takes its labels from the ids themselves.
        labels, learned = batch["input_ids"], batch["completion_mask"] == 1
    else:
        halves = {None: row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]}
        labels, learned = batch["labels"], batch["labels"] != NO_LOSS
    return [
        _Sequence(
            half=half,
            messages=messages,
            answers=_answers(messages, every="messages" in row),
            ids=batch["input_ids"][number],
            labels=labels[number],
            learned=learned[number],
            attended=batch["attention_mask"][number],
            spans=_spans(learned[number]),
        )
        for number, (half, messages) in enumerate(halves.items())
    ]


def _answers(messages: Sequence[Any], every: bool) -> list[int]:
    """Which messages carry loss: every one of the assistant's, or the last."""
    if not every:
        return [len(messages) - 1]
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _wrong(row: Row, sequence: _Sequence, collator: Collator, processor: ProcessorMixin) -> list[str]:
    """What is wrong with what carries loss."""
    ids, learned, spans = sequence.ids, sequence.learned, sequence.spans
    if not spans:
        return ["nothing carries loss"]
    reasons = []
    if bool((sequence.labels[learned] != ids[learned]).any()):
        reasons.append("labels differ from the tokens that they stand for")
    images = torch.isin(ids, torch.tensor([one for one in processor.image_token_ids if one is not None]))
    if bool((images & learned).any()):
        reasons.append(f"{int((images & learned).sum())} image tokens carry loss")
    padding = learned & (sequence.attended == 0)
    if bool(padding.any()):
        reasons.append(f"{int(padding.sum())} tokens of padding carry loss")
    if len(spans) != len(sequence.answers):
        return [*reasons, f"{len(spans)} stretches carry loss for {len(sequence.answers)} answers"]
    done = 0
    for span, answer in zip(spans, sequence.answers, strict=True):
        text = words(sequence.messages[answer])
        said = processor.decode(ids[span.start : span.stop], skip_special_tokens=True)
        if _plain(text) not in _plain(said):
            reasons.append(f"the loss is on {said!r} and not on the answer {text!r}")
        prompt = _prompt_length(row, sequence, answer, collator)
        if bool(learned[done:prompt].any()):
            reasons.append(f"the prompt carries loss: {processor.decode(ids[span.start : prompt])!r}")
        done = span.stop
    return reasons


def _prompt_length(row: Row, sequence: _Sequence, answer: int, collator: Collator) -> int:
    """Tokens before an answer: those that the row has in common with what its generation begins from."""
    ids, messages = sequence.ids, sequence.messages[: answer + 1]
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    images = [stored for stored in row["images"] if stored is not None][:shown]
    asked = collator.prompts([{**row, "messages": messages, "images": images}])["input_ids"][0]
    common = min(len(asked), len(ids))
    differ = (asked[:common] != ids[:common]).nonzero()
    return int(differ[0]) if len(differ) else common


def _described(row: Row, sequences: Sequence[_Sequence], processor: ProcessorMixin) -> list[str]:
    counts = [sum(span.stop - span.start for span in sequence.spans) for sequence in sequences]
    learned = " and ".join(str(count) for count in counts)
    lines = [
        f"  {row['row']}: {row['tokens']:,} tokens, {row['image_count']} images, {learned} tokens carry loss"
    ]
    for sequence in sequences:
        for span in sequence.spans:
            if sequence is sequences[0]:  # the halves of a pair have one prompt
                prompt = processor.decode(sequence.ids[: span.start])
                lines.append(f"    prompt ends  {prompt[-SHOWN_CHARACTERS:]!r}")
            answer = processor.decode(sequence.ids[span.start : span.stop])
            cut = "" if len(answer) <= SHOWN_CHARACTERS else f" ... {answer[-SHOWN_CHARACTERS // 2 :]!r}"
            lines.append(f"    {sequence.half or 'loss on':<12} {answer[:SHOWN_CHARACTERS]!r}{cut}")
    return lines


def _mixed(rows: Rows, collator: Collator) -> list[str]:
    """Whether rows with and without images go into one batch, where the dataset has both."""
    counts = rows.dataset.with_format("numpy", columns=["image_count"])["image_count"][:]
    without = [int(position) for position in (counts == 0).nonzero()[0][:1]]
    shown = [int(position) for position in (counts > 0).nonzero()[0][:1]]
    if not without:
        return []
    problems = []
    for positions in [without, *([[*without, *shown], [*shown, *without]] if shown else [])]:
        batch = [rows.dataset[position] for position in positions]
        try:
            collator(batch)
        except REFUSALS as error:
            names = " and ".join(row["row"] for row in batch)
            problems.append(
                f"{names}: the processor cannot make a batch with rows that have no image: {error}"
            )
    return problems


def _stops(processor: ProcessorMixin, collator: Collator) -> bool:
    """Whether the end of a turn is among what the template marks; without marks it always carries loss."""
    if not has_generation_markers(collator.template):
        return True
    return bool(is_chat_template_stop_token_trained(processor, chat_template=collator.template))


def _spans(learned: torch.Tensor) -> list[_Span]:
    """The runs of True in a (T,) bool tensor."""
    outside = torch.zeros(1, dtype=torch.int32)
    edges = torch.diff(learned.int(), prepend=outside, append=outside)
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [_Span(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def _plain(text: str) -> str:
    """Without the white space that tokenizers and templates add or drop."""
    return "".join(text.split())
