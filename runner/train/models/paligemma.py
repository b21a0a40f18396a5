"""PaliGemma's processor, so that TRL's collators can use it: what it lacks and what it insists on, mended.

PaliGemma has no chat. It reads all images, `<bos>`, a prefix that ends in a newline, and answers once, with a
suffix that ends in `<eos>`; the prefix is attended to in both directions (token type 0), the suffix causally
(1). Its published processor has no chat template, refuses text without an image, which is what a collator
makes of an answer, and returns labels even to those who ask for a prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers import PaliGemmaProcessor as Published

from runner.errors import DataError

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endfor %}"
    "{% for message in messages %}"
    "{% if not loop.first and message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""All images first, because the processor writes `<bos>` after the last one; then a line for every message.
The processor itself ends a prompt with a newline."""


class PaliGemmaProcessor(Published):
    """See the module. Bears the published name, which a saved processor is loaded by."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prompts with their images, or answers without.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids`: (B, T); `pixel_values` with prompts.

        Raises:
            DataError: a prompt that ends with its answer, as a conversation of several does.
            ValueError: a prompt without an image.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if images is None and all(one.endswith(self.tokenizer.eos_token) for one in texts):
            suffixes = self.tokenizer(texts, **kwargs)
            suffixes["token_type_ids"] = torch.as_tensor(suffixes["attention_mask"]).clone()
            return BatchFeature(dict(suffixes))
        if any(one.endswith(self.tokenizer.eos_token) for one in texts):
            raise DataError(
                "datasets: a row has several assistant turns, and PaliGemma learns one answer a row: all "
                "that is before it is attended to in both directions. Remedy: make a row of every turn, with "
                "the turns before it in the prompt of format prompt_completion"
            )
        if not all(self.image_token in one for one in texts):
            raise ValueError("PaliGemma takes no prompt without an image")
        # As lists first: upstream makes its labels of them, and numpy deprecates that for tensors.
        tensor_type = kwargs.pop("return_tensors", None)
        prompts = dict(super().__call__(images=images, text=texts, **kwargs))
        del prompts["labels"]
        return BatchFeature(prompts, tensor_type=tensor_type)


def prefix_and_suffix(processor: ProcessorMixin) -> PaliGemmaProcessor:
    """The published processor, mended; a chat template of its own is kept."""
    return PaliGemmaProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template or CHAT_TEMPLATE,
    )
