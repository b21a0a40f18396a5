"""The models of the speed bench: random weights in published shapes, made on the spot.

    proportions    SmolVLM's widths, depths and vocabulary divided by six (`attempt.build_model`), float32
    smolvlm        SmolVLM-Instruct, 2.2 billion parameters, 4-bit nf4 over bfloat16
    qwen2vl-7b     Qwen2-VL-7B-Instruct, 8.3 billion parameters, 4-bit nf4 over bfloat16

Shapes are those of the published configurations. Tokenizers are small ones, made here, because there is no
hub: of the vocabulary only the size matters. `tiny` makes of each a model of seconds, for tests. Weights are
saved once; every process loads and packs them, as a course script does. Qwen2-VL's processor needs
torchvision.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attempt import build_model

FOUR_BIT = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
TILES = {
    "size": {"longest_edge": 4 * 384},
    "max_image_size": {"longest_edge": 384},
    "do_image_splitting": True,
    "image_seq_len": 81,
}
"""13 tiles of a picture of 850 x 600."""

SMOLVLM_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SMOLVLM_VISION |= {"num_attention_heads": 16}
SMOLVLM_TEXT = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
SMOLVLM_TEXT |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64}
SMOLVLM_TEXT |= {"vocab_size": 49155, "max_position_embeddings": 16384}

QWEN_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
QWEN_TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN_TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064}
QWEN_TEXT |= {"max_position_embeddings": 32768, "max_window_layers": 28}

TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
TINY_VISION |= {"num_attention_heads": 2, "image_size": 84}
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 640}
TINY_TILES = {"size": {"longest_edge": 2 * 84}, "max_image_size": {"longest_edge": 84}}
TINY_TILES |= {"do_image_splitting": True, "image_seq_len": 4}


@dataclass(frozen=True)
class Model:
    """A model of the bench, and how both sides load it."""

    family: str
    """Its `model_type`: idefics3 or qwen2_vl."""
    dtype: str
    frozen: str
    """PEFT's pattern of the modules that plain TRL's adapter leaves out: tower and projector."""
    unpacked: list[str]
    """Modules that bitsandbytes leaves out for plain TRL: the same, and the head."""
    quantization: dict[str, Any] | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of AutoProcessor."""
    vision: dict[str, int] | None = None
    text: dict[str, int] | None = None


IDEFICS3: dict[str, Any] = {
    "family": "idefics3",
    "frozen": r"model\.(vision_model|connector)(\..*)?",
    "unpacked": ["model.vision_model", "model.connector", "lm_head"],
    "processor": TILES,
}
QWEN2_VL: dict[str, Any] = {
    "family": "qwen2_vl",
    "frozen": r"model\.visual(\..*)?",
    "unpacked": ["model.visual", "lm_head"],
}
PACKED: dict[str, Any] = {"dtype": "bfloat16", "quantization": FOUR_BIT}

MODELS = {
    "proportions": Model(**IDEFICS3, dtype="float32"),
    "smolvlm": Model(**IDEFICS3, **PACKED, vision=SMOLVLM_VISION, text=SMOLVLM_TEXT),
    "qwen2vl-7b": Model(**QWEN2_VL, **PACKED, vision=QWEN_VISION, text=QWEN_TEXT),
}
_TINY_TILED = {**IDEFICS3, "processor": TINY_TILES, "vision": TINY_VISION, "text": TINY_TEXT}
TINY = {
    "proportions": Model(**_TINY_TILED, dtype="float32"),
    "smolvlm": Model(**_TINY_TILED, **PACKED),
    "qwen2vl-7b": Model(**QWEN2_VL, **PACKED),
}


def build(model: Model, folder: Path, device: str) -> None:
    """Write a model folder, as a hub repository has it.

    Args:
        device: where the random numbers are drawn; a GPU takes seconds where a CPU takes minutes.
    """
    if model.family == "idefics3":
        build_model(folder, model.text, model.vision, model.dtype, device)
    else:
        _build_qwen(model, folder, device)
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # those who train need it


def _build_qwen(model: Model, folder: Path, device: str) -> None:
    """Configuration, tokenizer and processor of `tests.tiny_models`, with the sizes of `model` if it has any,
    and then with the published bounds of a picture."""
    import torch
    from transformers import AutoModelForImageTextToText

    from tests.tiny_models import MAKERS

    if importlib.util.find_spec("torchvision") is None:
        raise SystemExit("qwen2vl-7b: its processor needs torchvision; remedy: install it beside torch")
    tiny = MAKERS["qwen2_vl"]()
    fields = tiny.config.to_dict()
    if model.text is not None:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        fields["vision_config"] |= model.vision
        fields["text_config"] |= model.text | {"rope_parameters": rope}
        fields["text_config"].pop("layer_types", None)  # made anew for the other depth
        tiny.processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForImageTextToText.from_config(
            type(tiny.config).from_dict(fields), dtype=getattr(torch, model.dtype)
        )
    made.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
