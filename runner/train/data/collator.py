"""Rows -> a batch: images decoded under the policy, text and labels exactly as TRL's own collator makes them.

    train      Collator(...)(rows)          padded right, loss on the answers only
    generate   Collator(...).prompts(rows)  padded left, no labels, up to where the answer begins

A row has `prompt` and `completion` (loss on the completion), `messages` (loss on every assistant turn, see
`runner.train.data.turns`), or `prompt`, `chosen` and `rejected` (a pair).
Rows with several images, one and none go into one batch, where the processor takes them. That is for one
process: a rank whose batch has no image does not run the tower, and strategies that shard the model over
ranks would wait for it; they refuse such rows. Nothing is ever truncated. It holds a processor and plain
values, so it can be sent to the loader's workers, where the decoding happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL.Image import Image
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from runner.errors import DataError
from runner.train.data.images import BadImage, open_image
from runner.train.data.messages import without_nulls
from runner.train.data.turns import TurnCollator

Form = Literal["prompt_completion", "messages", "preference"]
Row = Mapping[str, Any]
Batch = dict[str, Any]

_MESSAGES: tuple[str, ...] = ("messages",)
_COMPLETION: tuple[str, ...] = ("prompt", "completion")
_PAIR: tuple[str, ...] = ("prompt", "chosen", "rejected")
"""The columns of each form that hold messages."""

_MASKS = ("pixel_attention_mask", "pixel_mask")
"""0/1 masks over pixels, by the names that transformers' processors give them."""


class Collator:
    """See the module. Deterministic: the same rows give the same bits."""

    def __init__(self, processor: ProcessorMixin, form: Form, dtype: torch.dtype) -> None:
        """
        Args:
            form: of the training rows.
            dtype: of the model's weights; pixel values are cast to it.
        """
        self.processor = processor
        self.form: Form = form
        self.dtype = dtype
        self._completions = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        self._pairs = DataCollatorForVisionPreference(processor)
        self._turns = TurnCollator(processor) if form == "messages" else None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A training batch of B rows, T tokens.

        Returns:
            What TRL's `DataCollatorForVisionLanguageModeling` returns (`input_ids`, `attention_mask`,
            `labels`: int64 (B, T); -100 where there is no loss; `pixel_values` and whatever else the
            processor makes), or, for pairs, its `DataCollatorForVisionPreference` (`input_ids`,
            `attention_mask`, `completion_mask`: int64 (2B, T), the chosen answers first, then the rejected
            ones; the images, too, stand there twice); with pixel values in the model's dtype, pixel masks as
            bool, and `row_index`, `image_count`: int64 (B,), where each image counts once. Conversations of
            which the first has no image come in another order than `rows`.

        Raises:
            DataError: an image that was readable before training is not any more, or the turns of a row
                cannot be found.
        """
        if "messages" in rows[0]:
            rows = _images_first(rows)
            self._turns = self._turns or TurnCollator(self.processor)
            collate, names = self._turns, _MESSAGES
        elif "chosen" in rows[0]:
            collate, names = self._pairs, _PAIR
        else:
            collate, names = self._completions, _COMPLETION
        shown = [images(row) for row in rows]
        examples = [
            {"images": pictures, **{name: without_nulls(row[name]) for name in names}}
            for row, pictures in zip(rows, shown, strict=True)
        ]
        return self._finished(collate(examples), rows, [len(pictures) for pictures in shown])

    def prompts(self, rows: Sequence[Row]) -> Batch:
        """A batch to generate from: the training prompts up to the answer, padded left, without labels."""
        shown = [images(row) for row in rows]
        texts = [
            apply_chat_template(
                {"prompt": prepare_multimodal_messages(without_nulls(prompt_of(row)), images=pictures)},
                self.processor,
            )["prompt"]
            for row, pictures in zip(rows, shown, strict=True)
        ]
        batch = self.processor(
            images=shown if any(shown) else None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # the template has written them
        )
        return self._finished(batch, rows, [len(pictures) for pictures in shown])

    @property
    def template(self) -> str:
        """The chat template that conversations are rendered with."""
        self._turns = self._turns or TurnCollator(self.processor)
        return self._turns.template

    def texts(self, row: Row) -> list[list[str]]:
        """What a row is tokenized from, each image still one placeholder: the parts of its sequence, and of
        a pair those of both.

        Raises:
            Unusable: its turns cannot be found.
            TemplateError: the chat template refuses them.
        """
        if "messages" in row:
            self._turns = self._turns or TurnCollator(self.processor)
            return [[self._turns.text(without_nulls(row["messages"]))]]
        names = _PAIR if "chosen" in row else _COMPLETION
        rendered = apply_chat_template({name: without_nulls(row[name]) for name in names}, self.processor)
        return [[rendered["prompt"], rendered[answer]] for answer in names[1:]]

    def _finished(self, batch: Mapping[str, Any], rows: Sequence[Row], image_counts: Sequence[int]) -> Batch:
        finished = dict(batch)
        for name, value in finished.items():
            if name in _MASKS:
                finished[name] = value.bool()  # int64 would be eight times the memory
            elif name.startswith("pixel_values") and isinstance(value, torch.Tensor):
                finished[name] = value.to(self.dtype)
        finished["row_index"] = torch.tensor([row["index"] for row in rows], dtype=torch.int64)
        finished["image_count"] = torch.tensor(image_counts, dtype=torch.int64)
        return finished


def _images_first(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows in an order that processors take: transformers (5.23) looks at the first one alone to see
    whether
    placeholders were replaced, and then cannot make assistant masks for the others."""
    if rows[0]["image_count"]:
        return rows
    return sorted(rows, key=lambda row: row["image_count"] == 0)


def prompt_of(row: Row) -> Any:
    """The messages before the answer that evaluation asks for: the last one."""
    return row["messages"][:-1] if "messages" in row else row["prompt"]


def images(row: Row) -> list[Image]:
    """The row's images, RGB, upright, shrunk if it had to be.

    Raises:
        DataError: one cannot be read.
    """
    try:
        return [open_image(stored, row["scale"])[0] for stored in row["images"] if stored is not None]
    except BadImage as error:
        raise DataError(
            f"{row['row']}: {error}. It was readable when the rows were checked; remedy: leave the data "
            "alone while a run uses it, and start the same command again"
        ) from error
