"""The text side of `tests.tiny_models`: tokenizers that know bytes, configurations, chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% elif message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}[/INST]{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]"
    "{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]{% else %}{{ message['content'][0]['text'] }}</s>"
    "{% endif %}{% endfor %}"
)
"""In the manner of the published ones, for the architectures whose template TRL has no copy of."""


def tokenizer(
    special: Sequence[str], *, eos: str, pad: str, bos: str | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """Bytes and special tokens. `named` become attributes that survive saving: `image_token=...`."""
    tokens = list(dict.fromkeys([*special, eos, pad, *([bos] if bos else []), *named.values()]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        additional_special_tokens=list(special),
        extra_special_tokens=named,
        padding_side="left",
    )


def text(made: PreTrainedTokenizerFast, model_type: str, **changes: Any) -> dict[str, Any]:
    """A text configuration. The vocabulary is rounded up as in published models; PaliGemma adds tokens."""
    ids = {
        "eos_token_id": made.eos_token_id,
        "bos_token_id": made.bos_token_id,
        "pad_token_id": made.pad_token_id,
    }
    return {"model_type": model_type, **TEXT, "vocab_size": -(-len(made) // 64) * 64, **ids, **changes}


def token(made: PreTrainedTokenizerFast, text: str) -> int:
    identifier = made.convert_tokens_to_ids(text)
    assert isinstance(identifier, int)
    return identifier
