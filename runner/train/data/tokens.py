"""How many tokens a row will have, before anything is trained, without processing every image.

    tokens of a row = tokens of its text, each image one placeholder  +  for every image, what its size adds

Of a pair, the text is the prompt and the longer of its two answers.

What a size adds comes from, in this order, the first that agrees with really processed rows:

    formula    the processor's `_get_num_multimodal_tokens`, where its class has one
    blank      a blank image of that size, really processed, once per size
    real       nothing agrees: every row is really processed

Truncation is not a way to make a row fit, because it cuts image tokens; `fitting` finds how far its images
must shrink, where shrinking helps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers import ProcessorMixin

from runner.train.data.collator import Collator
from runner.train.data.images import scaled
from runner.train.data.messages import Unusable

Size = tuple[int, int]
"""Height and width in pixels."""

PROBES = 6
"""Rows that are really processed to check a way of counting: spread over the image sizes that occur."""

SHRINK = 0.95
SMALLEST_SIDE = 32
"""Images are not shrunk below this many pixels a side: nothing can be read in them."""

REFUSALS = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ZeroDivisionError)
"""What processors raise for sizes and batches that they do not take."""


class Unfit(Exception):
    """The chat template or the processor does not take a row; the message says why."""


@dataclass(frozen=True)
class Counted:
    """What is to be counted: a row of the dataset and the sizes of its images."""

    row: Mapping[str, Any]
    sizes: Sequence[Size]


class TokenCounter:
    """Counts rows of one dataset, as its collator would collate them one by one. Remembers sizes."""

    def __init__(self, collator: Collator, probes: Sequence[Counted]) -> None:
        """
        Args:
            probes: rows to choose the way of counting by; `spread` picks them.
        """
        self._collator = collator
        self._processor: ProcessorMixin = collator.processor
        self._added: dict[Size, int | Unfit] = {}
        for way, measure in self._ways():
            self.way, self._measure = way, measure
            self._added.clear()
            if measure is None or self._agrees(probes):
                break

    @property
    def needs_images(self) -> bool:
        """Whether `whole` needs the images of every row, not only their sizes."""
        return self._measure is None

    def count(self, rows: Sequence[Counted]) -> list[int | Unfit]:
        """Tokens of every row, or why the chat template or the processor refuses it."""
        texts = self.text_tokens([row.row for row in rows])
        return [self.whole(text, row) for text, row in zip(texts, rows, strict=True)]

    def text_tokens(self, rows: Sequence[Mapping[str, Any]]) -> list[int | Unfit]:
        """Tokens of every row with each image as one placeholder; of a pair, those of the longer sequence."""
        texts = [self._texts(row) for row in rows]
        rendered = [row for row in texts if not isinstance(row, Unfit)]
        lengths = iter(self._tokenized([part for row in rendered for parts in row for part in parts]))
        return [
            row if isinstance(row, Unfit) else max(sum(next(lengths) for _ in parts) for parts in row)
            for row in texts
        ]

    def _texts(self, row: Mapping[str, Any]) -> list[list[str]] | Unfit:
        try:
            return self._collator.texts(row)
        except TemplateError as error:  # what a template raises for turns that it does not take
            return Unfit(f"the model's chat template refuses it: {error}")
        except Unusable as error:
            return Unfit(str(error))

    def fitting(self, row: Counted, limit: int) -> tuple[float, int] | None:
        """The largest power of 0.95 that brings the row to `limit` tokens when its images shrink by it, and
        its tokens.

        None if none does: the text alone is too long, or the processor scales small images up again.
        """
        if self._measure is None or not row.sizes:
            return None
        (text,) = self.text_tokens([row.row])
        if isinstance(text, Unfit):
            return None

        def total(scale: float) -> int | Unfit:
            return self._total(text, [scaled(*size, scale) for size in row.sizes])

        smallest = SMALLEST_SIDE / min(min(size) for size in row.sizes)
        least = total(smallest) if smallest < 1.0 else None
        if not isinstance(least, int) or least > limit:
            return None
        scale = SHRINK
        while scale > smallest:
            tokens = total(scale)
            if isinstance(tokens, int) and tokens <= limit:
                return scale, tokens
            scale *= SHRINK
        return smallest, least

    def _ways(self) -> list[tuple[str, Callable[[Size], int] | None]]:
        ways: list[tuple[str, Callable[[Size], int] | None]] = [("blank", self._by_blank), ("real", None)]
        # Not every class has the method, and nothing public tells (transformers 5.23).
        if hasattr(self._processor, "_get_num_multimodal_tokens"):
            ways.insert(0, ("formula", self._by_formula))
        return ways

    def _by_formula(self, size: Size) -> int:
        found = self._processor._get_num_multimodal_tokens(image_sizes=[list(size)])
        return int(found.num_image_tokens[0]) - 1  # less the placeholder

    def _by_blank(self, size: Size) -> int:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        text = self._processor.apply_chat_template([message], tokenize=False)
        blank = Image.new("RGB", size[::-1])
        processed = self._processor(
            images=[[blank]], text=[text], return_tensors="pt", add_special_tokens=False
        )
        return int(processed["input_ids"].shape[1]) - self._tokenized([text])[0]

    def _tokenized(self, texts: list[str]) -> list[int]:
        if not texts:  # which tokenizers do not take
            return []
        ids = self._processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [len(one) for one in ids]

    def _added_by(self, size: Size, measure: Callable[[Size], int]) -> int | Unfit:
        if size not in self._added:
            try:
                self._added[size] = measure(size)
            except REFUSALS as error:
                self._added[size] = Unfit(f"the processor refuses an image of {size[1]} x {size[0]}: {error}")
        return self._added[size]

    def whole(self, text: int | Unfit, row: Counted) -> int | Unfit:
        """Tokens of a row with its images, from those of its text.

        Args:
            row: only its sizes are looked at, unless `needs_images`.
        """
        really = self._measure is None and not isinstance(text, Unfit)
        return self._really(row) if really else self._total(text, row.sizes)

    def _total(self, text: int | Unfit, sizes: Sequence[Size]) -> int | Unfit:
        if isinstance(text, Unfit):
            return text
        assert self._measure is not None
        total = text
        for size in sizes:
            added = self._added_by(size, self._measure)
            if isinstance(added, Unfit):
                return added
            total += added
        return total

    def _really(self, row: Counted) -> int | Unfit:
        try:
            return int(self._collator([row.row])["input_ids"].shape[1])
        except REFUSALS as error:
            return Unfit(f"the processor refuses the row: {error}")

    def _agrees(self, probes: Sequence[Counted]) -> bool:
        counts = self.count(probes)
        return all(
            isinstance(count, Unfit) or count == self._really(probe)
            for count, probe in zip(counts, probes, strict=True)
        )


def spread(sizes: Sequence[Sequence[Size]], at_most: int = PROBES) -> list[int]:
    """Positions of rows to probe: evenly over the rows in order of the number and area of their images."""
    order = sorted(
        range(len(sizes)), key=lambda position: (len(sizes[position]), sum(h * w for h, w in sizes[position]))
    )
    if len(order) <= at_most:
        return order
    return [order[round(step * (len(order) - 1) / (at_most - 1))] for step in range(at_most)]
