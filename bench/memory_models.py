"""The models that bench/memory_model.py measures: random, of three families, 60 to 80 million parameters.

Configuration and processor are those of `tests.tiny_models`, widened: weights and activations weigh hundreds
of MiB beside the libraries. Saved in bfloat16, as published models are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN = 768
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
}
TOWER: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "patch_size": 14,
}


def _idefics3() -> tuple[dict[str, Any], Callable[[Any], None]]:
    """81 tokens a tile of 27 x 27 patches; 850 x 600 pictures become 13 tiles, or 5 at half the size."""

    def processor(made: Any) -> None:
        made.image_processor.size = {"longest_edge": 2 * 378}
        made.image_processor.max_image_size = {"longest_edge": 378}
        made.image_seq_len = 81

    return {"vision_config": TOWER | {"image_size": 378}, "text_config": TEXT, "scale_factor": 3}, processor


def _qwen2_vl() -> tuple[dict[str, Any], Callable[[Any], None]]:
    """Grouped-query attention; one token for 2 x 2 patches, at most 1,024 patches a picture."""

    def processor(made: Any) -> None:
        made.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}

    tower = {"depth": 4, "embed_dim": 384, "hidden_size": HIDDEN, "num_heads": 6, "mlp_ratio": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8]}
    text = TEXT | {"num_key_value_heads": 4, "rope_parameters": rope}
    return {"vision_config": tower, "text_config": text}, processor


def _llava() -> tuple[dict[str, Any], Callable[[Any], None]]:
    """CLIP's tower: 576 tokens a picture."""

    def processor(made: Any) -> None:
        made.image_processor.size = {"shortest_edge": 336}
        made.image_processor.crop_size = {"height": 336, "width": 336}

    changes = {"vision_config": TOWER | {"image_size": 336}, "text_config": TEXT, "image_seq_length": 576}
    return changes, processor


FAMILIES = {"idefics3": _idefics3, "llava": _llava, "qwen2_vl": _qwen2_vl}


def build(family: str, folder: Path) -> Path:
    """Write a model folder, as a hub repository has it."""
    import torch
    from transformers import AutoModelForImageTextToText

    from tests.tiny_models import MAKERS

    tiny = MAKERS[family]()
    changes, widen = FAMILIES[family]()
    fields = tiny.config.to_dict()
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    fields["text_config"].pop("layer_types", None)  # made anew for the other depth
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(type(tiny.config).from_dict(fields))
    model.to(torch.bfloat16).save_pretrained(folder)
    widen(tiny.processor)
    tiny.processor.save_pretrained(folder)
    return folder
