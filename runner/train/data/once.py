"""A processor that works on an image once, however many rows of a batch show it.

    pairs        TRL's collator asks for every prompt twice, for chosen and for rejected: half is processed
    image sets   rows that were said to show the same images: one set is processed, every row gets the tokens

Pixel values and what goes with them then stand once per image set, in the order of the sets; tokens stand for
every row, as without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature, Gemma3Processor, Idefics2Processor, InternVLProcessor, ProcessorMixin

TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What stands for every row."""

Groups = Sequence[int]
"""The image set of every row."""


def tells_sets(processor: ProcessorMixin) -> bool:
    """Whether image sets can be told to it. Idefics2's expands tokens before it looks at images, InternVL's
    cuts the tiles by all rows' placeholders (transformers 5.23), and crops of Gemma 3 cannot be told apart
    behind the tower."""
    if isinstance(processor, Gemma3Processor):
        return not processor.image_processor.do_pan_and_scan
    return not isinstance(processor, (Idefics2Processor, InternVLProcessor))


class Once:
    """Goes before a processor's class; made by `once`."""

    _sets: Groups | None = None
    _pairs: bool = False

    @contextlib.contextmanager
    def showing(self, sets: Groups) -> Iterator[None]:
        """Inside, the rows of a call with images show these image sets."""
        self._sets = sets
        try:
            yield
        finally:
            self._sets = None

    @contextlib.contextmanager
    def twice(self) -> Iterator[None]:
        """Inside, the rows of a call with images are some rows and then the same once more."""
        self._pairs = True
        try:
            yield
        finally:
            self._pairs = False

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        if images is None or not self._pairs:
            return super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]
        half = len(text) // 2
        made = super().__call__(images=images[:half], text=text[:half], **kwargs)  # type: ignore[misc]
        for name in TOKENS:
            if name in made:
                made[name] = torch.cat((made[name], made[name]))
        return made

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        if self._sets is None:
            return super()._process_images(images, **kwargs)  # type: ignore[misc]
        first = [self._sets.index(number) for number in range(max(self._sets) + 1)]
        shown = [images[row] for row in first]
        processed, texts = super()._process_images(shown, **kwargs)  # type: ignore[misc]
        each = iter(texts)
        of_set = [[next(each) for _ in pictures] for pictures in shown]
        return processed, [text for number in self._sets for text in of_set[number]]


def once(processor: ProcessorMixin) -> Any:
    """The same processor, over the same parts, with what `Once` adds."""
    kind = type(processor)
    fields = {"__reduce__": lambda _: (once, (processor,))}
    made: Any = object.__new__(type(kind.__name__, (Once, kind), fields))
    made.__dict__.update(processor.__dict__)
    return made
