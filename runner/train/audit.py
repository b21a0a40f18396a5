"""The label audit: before step 1, decode what really carries loss and refuse what must not.

`audit` sends a few rows through the collator that training uses and looks at the labels that come out: an
answer must carry loss, once for every assistant turn; an image token, or anything that stands before the
answer, must not. That no row has an empty answer was checked on all rows (`runner.train.formats`). It changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.chat_template_utils import is_chat_template_stop_token_trained

from runner.errors import DataError
from runner.train.collator import Collator, Row
from runner.train.data import Rows
from runner.train.formats import words
from runner.train.tokens import REFUSALS

SHOWN_CHARACTERS = 60
"""How much of a prompt's end and of an answer a line shows."""

NO_LOSS = -100


def audit(rows: Rows, collator: Collator, processor: ProcessorMixin, samples: int = 3) -> list[str]:
    """Check the labels of rows spread evenly over the dataset.

    Args:
        collator: the one that training gets.
        samples: rows to look at.

    Returns:
        Lines to print: for each row its name, its tokens, the end of its prompt and what carries loss.

    Raises:
        DataError: labels that are wrong, or rows with and without images that do not go into one batch. All
            at once.
    """
    count = len(rows.dataset)
    positions = sorted(
        {round(step * (count - 1) / max(1, samples - 1)) for step in range(min(samples, count))}
    )
    lines = [f"label audit: {len(positions)} of {count:,} rows"]
    problems: list[str] = []
    for position in positions:
        row = rows.dataset[position]
        spans, reasons = _checked(row, collator, processor)
        problems += [f"{row['row']}: {reason}" for reason in reasons]
        lines += _described(row, spans, collator, processor)
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


def _checked(row: Row, collator: Collator, processor: ProcessorMixin) -> tuple[list[_Span], list[str]]:
    """The spans of a row that carry loss, and what is wrong with them."""
    batch = collator([row])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = labels != NO_LOSS
    spans = _spans(learned)
    if not spans:
        return spans, ["nothing carries loss"]
    reasons = []
    if bool((labels[learned] != ids[learned]).any()):
        reasons.append("labels differ from the tokens that they stand for")
    images = torch.isin(ids, torch.tensor([one for one in processor.image_token_ids if one is not None]))
    if bool((images & learned).any()):
        reasons.append(f"{int((images & learned).sum())} image tokens carry loss")
    answers = _answers(row)
    if len(spans) != len(answers):
        return spans, [*reasons, f"{len(spans)} stretches carry loss for {len(answers)} answers"]
    done = 0
    for span, answer in zip(spans, answers, strict=True):
        text = words(_messages(row)[answer])
        said = processor.decode(ids[span.start : span.stop], skip_special_tokens=True)
        if _plain(text) not in _plain(said):
            reasons.append(f"the loss is on {said!r} and not on the answer {text!r}")
        prompt = _prompt_length(row, answer, ids, collator)
        if bool(learned[done:prompt].any()):
            reasons.append(f"the prompt carries loss: {processor.decode(ids[span.start : prompt])!r}")
        done = span.stop
    return spans, reasons


def _answers(row: Row) -> list[int]:
    """Which messages carry loss."""
    messages = _messages(row)
    if "messages" not in row:
        return [len(messages) - 1]
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _prompt_length(row: Row, answer: int, ids: torch.Tensor, collator: Collator) -> int:
    """Tokens before an answer: those that the row has in common with what its generation begins from."""
    messages = _messages(row)[: answer + 1]
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    images = [stored for stored in row["images"] if stored is not None][:shown]
    asked = collator.prompts([{**row, "messages": messages, "images": images}])["input_ids"][0]
    common = min(len(asked), len(ids))
    differ = (asked[:common] != ids[:common]).nonzero()
    return int(differ[0]) if len(differ) else common


def _described(row: Row, spans: Sequence[_Span], collator: Collator, processor: ProcessorMixin) -> list[str]:
    ids = collator([row])["input_ids"][0]
    learned = sum(span.stop - span.start for span in spans)
    lines = [
        f"  {row['row']}: {row['tokens']:,} tokens, {row['image_count']} images, {learned} tokens carry loss"
    ]
    for span in spans:
        prompt = processor.decode(ids[: span.start])
        lines.append(f"    prompt ends  {prompt[-SHOWN_CHARACTERS:]!r}")
        answer = processor.decode(ids[span.start : span.stop])
        cut = "" if len(answer) <= SHOWN_CHARACTERS else f" ... {answer[-SHOWN_CHARACTERS // 2 :]!r}"
        lines.append(f"    loss on      {answer[:SHOWN_CHARACTERS]!r}{cut}")
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
    return bool(is_chat_template_stop_token_trained(processor, chat_template=collator.template))


def _spans(learned: torch.Tensor) -> list[_Span]:
    """The runs of True in a (T,) bool tensor."""
    outside = torch.zeros(1, dtype=torch.int32)
    edges = torch.diff(learned.int(), prepend=outside, append=outside)
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [_Span(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def _messages(row: Row) -> list[Any]:
    return list(row["messages"]) if "messages" in row else [*row["prompt"], *row["completion"]]


def _plain(text: str) -> str:
    """Without the white space that tokenizers and templates add or drop."""
    return "".join(text.split())
