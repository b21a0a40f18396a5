"""Conversations -> a batch with loss on every assistant turn, as TRL makes it, once its labels are right.

A chat template marks the characters of every assistant turn. transformers (5.23) moves the marks past the
placeholders that a processor expands to image tokens, if the processor tells where that was. Idefics2's does
not, and the marks come to lie on image tokens. For such a processor the turns are found again from the
conversation with its placeholders as they are, where the marks are right; that part can go when Idefics2's
processor tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from runner.errors import DataError


def training_template(processor: ProcessorMixin) -> str | None:
    """The chat template that marks assistant turns, or None if the processor's own does.

    Raises:
        DataError: the template has no markers and TRL knows no marked edition of it.
    """
    if has_generation_markers(processor.chat_template):
        return None
    try:
        return get_training_chat_template(processor)
    except ValueError as error:
        raise DataError(
            "datasets: a row has several assistant turns, which needs a chat template that marks them, "
            "and this model's has no {% generation %} markers, nor does TRL know a marked edition of it. "
            "Remedy: put {% generation %} and {% endgeneration %} around what the assistant says (up to and "
            "including its end-of-turn token) in the model folder's chat_template.jinja, or train on rows "
            "with one answer"
        ) from error


class TurnCollator:
    """TRL's collator for `{images, messages}`, with labels that are where the assistant speaks."""

    def __init__(self, processor: ProcessorMixin) -> None:
        """
        Raises:
            DataError: see `training_template`.
        """
        self.template = training_template(processor)
        self._processor = processor
        self._collate = DataCollatorForVisionLanguageModeling(
            processor, assistant_only_loss=True, chat_template=self.template
        )
        self._is_right = _tells_expansions(processor)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL returns; `labels` are int64 (B, T), -100 where the assistant does not speak."""
        batch: dict[str, Any] = self._collate(examples)
        if not self._is_right:
            template = self.template or self._processor.chat_template
            said = [
                _said(ids, attended, example["messages"], self._processor, template)
                for ids, attended, example in zip(
                    batch["input_ids"], batch["attention_mask"], examples, strict=True
                )
            ]
            batch["labels"] = torch.where(torch.stack(said), batch["input_ids"], -100)
        return batch


def _tells_expansions(processor: ProcessorMixin) -> bool:
    """Whether transformers can move the marks of this processor's conversations past its images."""
    blank = Image.new("RGB", (32, 32))
    made = processor(images=[[blank]], text=[processor.image_token], return_text_replacement_offsets=True)
    return "text_replacement_offsets" in made


def _said(
    ids: torch.Tensor,
    attended: torch.Tensor,
    messages: Sequence[dict[str, Any]],
    processor: ProcessorMixin,
    template: str,
) -> torch.Tensor:
    """The tokens of a conversation that the assistant's turns are made of.

    Args:
        ids: int64 (T,), images expanded, padded.
        attended: int64 (T,), 0 for padding.
        messages: what `ids` was rendered from, images as parts.
        template: marks the assistant's turns.

    Returns:
        Bool (T,).

    Raises:
        DataError: the two texts do not correspond.
    """
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    spoken: list[int] = text["input_ids"]
    # Of an image: its tokens, and the tokens around them, which no text has (`Reading.controls`).
    added = ({*processor.tokenizer.added_tokens_decoder} - {*spoken}) | {processor.image_token_id}
    whole = _stretches(ids[attended == 1].tolist(), added)
    plain = _stretches(spoken, {processor.image_token_id})
    first = int(attended.argmax())
    said = torch.zeros_like(ids, dtype=torch.bool)
    found = len(whole) == len(plain)
    for theirs, ours in zip(whole, plain, strict=False):
        # From the end: what follows an image directly may be split into other tokens, and is the user's.
        for place, number in zip(reversed(theirs), reversed(ours), strict=False):
            if text["assistant_masks"][number]:
                found = found and int(ids[first + place]) == spoken[number]
                said[first + place] = True
    if not (found and int(said.sum()) == sum(text["assistant_masks"])):
        raise DataError(
            "datasets: a row has several assistant turns, and this model's processor does not tell which "
            "tokens they are. Remedy: train on rows with one answer, or use a model whose processor does"
        )
    return said


def _stretches(ids: Sequence[int], images: set[int]) -> list[list[int]]:
    """Positions of the tokens between images: one list for every run of other tokens."""
    runs: list[list[int]] = []
    inside = False
    for position, token in enumerate(ids):
        if token in images:
            inside = False
        elif inside:
            runs[-1].append(position)
        else:
            runs.append([position])
            inside = True
    return runs
