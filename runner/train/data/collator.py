"""Rows -> a batch: images decoded under the policy, text and labels exactly as TRL's own collator makes them.

    train      Collator(...)(rows)          padded right, loss on the answers only
    generate   Collator(...).prompts(rows)  padded left, no labels, up to where the answer begins

Images that several rows show, and those of a pair, stand in a batch once, with `Sharing` that says who shows
what, where the job's `speed` asks for it.

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
from runner.train.data import sharing
from runner.train.data.images import BadImage, open_image
from runner.train.data.messages import without_nulls
from runner.train.data.once import once, tells_sets
from runner.train.data.turns import TurnCollator

Form = Literal["prompt_completion", "messages", "preference"]
Row = Mapping[str, Any]
Batch = dict[str, Any]

_COMPLETION: tuple[str, ...] = ("prompt", "completion")
_PAIR: tuple[str, ...] = ("prompt", "chosen", "rejected")
"""The columns of each form that hold messages."""

_MASKS = ("pixel_attention_mask", "pixel_mask")
"""0/1 masks over pixels, by the names that transformers' processors give them."""


class Collator:
    """See the module. Deterministic: the same rows give the same bits."""

    def __init__(
        self,
        processor: ProcessorMixin,
        form: Form,
        dtype: torch.dtype,
        *,
        images_once: bool = False,
        prefixes: bool = False,
    ) -> None:
        """
        Args:
            form: of the training rows.
            dtype: of the model's weights; pixel values are cast to it.
            images_once: whether images that rows share stand in a training batch once.
            prefixes: whether such rows may run as one sequence; means nothing without `images_once`.
        """
        self.processor = processor
        self.form: Form = form
        self.dtype = dtype
        self._images_once = images_once
        self._prefixes = prefixes
        self._once = once(processor)
        self._completions = DataCollatorForVisionLanguageModeling(self._once, completion_only_loss=True)
        self._pairs = DataCollatorForVisionPreference(self._once)
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
            which the first has no image come in another order than `rows`. Where rows share images,
            `sharing` is a `Sharing`, and the images of a set stand there once.

        Raises:
            DataError: an image that was readable before training is not any more, or the turns of a row
                cannot be found.
        """
        if "messages" in rows[0]:
            return self._conversations(_images_first(rows))
        pairs = "chosen" in rows[0]
        names = _PAIR if pairs else _COMPLETION
        sets = list(range(len(rows))) if pairs else self._sets(rows)
        of_set: dict[int, list[Image]] = {}
        for number, row in zip(sets, rows, strict=True):
            if number not in of_set:
                of_set[number] = images(row)
        shown = [of_set[number] for number in sets]
        examples = [
            {"images": pictures, **{name: without_nulls(row[name]) for name in names}}
            for row, pictures in zip(rows, shown, strict=True)
        ]
        shared = self._images_once and (pairs or len(of_set) < len(rows))
        if not shared:
            batch = (self._pairs if pairs else self._completions)(examples)
        elif pairs:
            with self._once.twice():
                batch = self._pairs(examples)
            sets *= 2
        else:
            with self._once.showing(sets):
                batch = self._completions(examples)
        finished = self._finished(batch, rows, [len(pictures) for pictures in shown])
        if shared:
            counts = [len(pictures) for pictures in of_set.values()]
            finished["sharing"] = self._sharing(finished, sets, counts)
        return finished

    def _conversations(self, rows: Sequence[Row]) -> Batch:
        self._turns = self._turns or TurnCollator(self.processor)
        shown = [images(row) for row in rows]
        examples = [
            {"images": pictures, "messages": without_nulls(row["messages"])}
            for row, pictures in zip(rows, shown, strict=True)
        ]
        return self._finished(self._turns(examples), rows, [len(pictures) for pictures in shown])

    def _sets(self, rows: Sequence[Row]) -> list[int]:
        """The image set of every row; all different where they are not to be shared, or cannot be."""
        if not self._images_once or not tells_sets(self.processor):
            return list(range(len(rows)))
        return sharing.image_sets([row["pictures"] for row in rows])

    def _sharing(self, batch: Batch, sets: Sequence[int], counts: Sequence[int]) -> sharing.Sharing:
        labels = batch.get("labels")
        return sharing.found(
            sets,
            counts,
            batch["input_ids"],
            batch["attention_mask"],
            batch["completion_mask"].bool() if labels is None else labels != -100,
            self.processor.image_token_id,
            prefixes=self._prefixes,
        )

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
