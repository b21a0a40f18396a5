"""Conversations -> a batch with loss on every assistant turn.

TRL makes the batch, and the labels too where the template marks what the assistant says with {% generation %}
and transformers (5.23) can move the marks past the image tokens that a processor puts in, because it tells
where. Else the turns are found here:

    template    processor        labels
    marked      tells            TRL's
    marked      does not tell    found: Idefics2's, whose marks would come to lie on image tokens
    unmarked    any              found

A turn is what a longer conversation has, and the one that asks for it has not: rendered up to the question,
and up to the answer. Then the tokens of the text are looked up among those of the batch, between its images.
Where that cannot be done, the row is refused.
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
from runner.train.data.messages import Unusable

Messages = Sequence[dict[str, Any]]


class TurnCollator:
    """TRL's collator for `{images, messages}`, with labels that are where the assistant speaks."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.template = turn_template(processor)
        self._processor = processor
        self._is_told = has_generation_markers(self.template) and _tells_expansions(processor)
        self._collate = DataCollatorForVisionLanguageModeling(
            processor, assistant_only_loss=self._is_told, chat_template=self.template
        )

    def text(self, messages: Messages) -> str:
        """A conversation as it is tokenized, each image still one placeholder.

        Raises:
            Unusable: its turns cannot be found.
        """
        if messages[0]["role"] == "assistant" and not self._is_told:
            raise Unusable(
                "it begins with an answer to nothing, which this model's chat template cannot tell apart"
            )
        text: str = self._processor.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        return text

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL returns; `labels` are int64 (B, T), -100 where the assistant does not speak.

        Raises:
            DataError: the turns of a row cannot be found.
        """
        batch: dict[str, Any] = self._collate(examples)
        if not self._is_told:
            ids = batch["input_ids"]
            said = [
                _said(row, attended, example["messages"], self._processor, self.template)
                for row, attended, example in zip(ids, batch["attention_mask"], examples, strict=True)
            ]
            batch["labels"] = torch.where(torch.stack(said), ids, -100)
        return batch


def turn_template(processor: ProcessorMixin) -> str:
    """The chat template that conversations are rendered with: the processor's own, or TRL's marked edition of
    it where there is one."""
    own: str = processor.chat_template
    if has_generation_markers(own):
        return own
    try:
        marked: str = get_training_chat_template(processor)
    except ValueError:  # TRL knows none
        return own
    return marked


def _tells_expansions(processor: ProcessorMixin) -> bool:
    """Whether transformers can move marks past this processor's image tokens."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    blank = Image.new("RGB", (32, 32))
    made = processor(images=[[blank]], text=[text], return_text_replacement_offsets=True)
    return "text_replacement_offsets" in made


def _said(
    ids: torch.Tensor, attended: torch.Tensor, messages: Messages, processor: ProcessorMixin, template: str
) -> torch.Tensor:
    """The tokens of a conversation that the assistant's turns are made of.

    Args:
        ids: int64 (T,), images expanded, padded.
        attended: int64 (T,), 0 for padding.
        messages: what `ids` was rendered from by `template`, images as parts.

    Returns:
        Bool (T,).
    """
    text, spans = _spans(messages, processor, template)
    plain = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    told: list[int] = plain["input_ids"]
    # As transformers does it: every token that overlaps a turn.
    spoken = [any(a < end and b > start for start, end in spans) for a, b in plain["offset_mapping"]]
    # Of an image: its tokens, and the tokens around them, which no text has (`Reading.controls`).
    added = ({*processor.tokenizer.added_tokens_decoder} - {*told}) | {processor.image_token_id}
    places = attended.nonzero().flatten().tolist()
    ours, theirs = _stretches(told, added), _stretches(ids[places].tolist(), added)
    said = torch.zeros_like(ids, dtype=torch.bool)
    found = len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=False):
        # From the end: what follows an image directly may be cut into other tokens, and is the user's.
        for token, place in zip(reversed(one), reversed(other), strict=False):
            if spoken[token]:
                found = found and told[token] == int(ids[places[place]])
                said[places[place]] = True
    if not (found and int(said.sum()) == sum(spoken)):
        raise _lost("its processor puts text of its own among the image tokens")
    return said


def _spans(messages: Messages, processor: ProcessorMixin, template: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, images as placeholders, and where the assistant speaks: [start, end)."""

    def rendered(count: int, asks: bool = False) -> str:
        text: str = processor.apply_chat_template(
            messages[:count], chat_template=template, tokenize=False, add_generation_prompt=asks
        )
        return text

    whole = rendered(len(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = rendered(number, asks=True), rendered(number + 1)
            if not (whole.startswith(after) and after.startswith(before)):
                raise _lost("its chat template writes a turn otherwise once another follows")
            spans.append((len(before), len(after)))
    return whole, spans


def _lost(reason: str) -> DataError:
    return DataError(
        "datasets: a row has several assistant turns, and with this model it cannot be told which tokens "
        f"they are: {reason}. Remedy: put {{% generation %}} and {{% endgeneration %}} around what the "
        "assistant says (up to and including its end-of-turn token) in the model folder's "
        "chat_template.jinja, or train on rows with one answer"
    )


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
