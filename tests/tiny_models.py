"""Tiny random models of every architecture, with their real configuration and processor classes; offline.

`save(name, folder)` writes what a hub repository holds: configuration, weights, tokenizer, processor, chat
template. Text models are two layers of width 64, towers two layers of width 32; the tokenizer knows bytes and
the architecture's own special tokens, and nothing is learned. A name is a row of the table of
architectures, or `pixtral`, a llava with Mistral's tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from trl.chat_template_utils import (
    gemma3_chat_template,
    idefics3_chat_template,
    llava_next_chat_template,
    qwen2_5_vl_chat_template,
    qwen3_vl_chat_template,
    smolvlm_chat_template,
)

from tests.tiny_text import CHATML_TEMPLATE, LLAVA_TEMPLATE, PIXTRAL_TEMPLATE, text, token, tokenizer

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""Four patches."""


@dataclass(frozen=True)
class Tiny:
    """What one architecture is made of."""

    config: PreTrainedConfig
    processor: ProcessorMixin


def config(model_type: str, made: PreTrainedTokenizerFast, **fields: Any) -> PreTrainedConfig:
    """The architecture's own configuration class; the tokenizer's ids on the outside, too."""
    ids = {"eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
    return CONFIG_MAPPING[model_type](**ids, **fields)


def _idefics2() -> Tiny:
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    made = tokenizer(special, eos="</s>", pad="<pad>", bos="<s>")
    images = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False
    )
    processor = transformers.Idefics2Processor(
        images, made, image_seq_len=4, chat_template=idefics3_chat_template
    )
    perceiver = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
        "hidden_size": 64,
    }
    fields = {
        "vision_config": {**TOWER, "image_size": 56},
        "perceiver_config": perceiver,
        "text_config": text(made, "mistral"),
        "image_token_id": token(made, "<image>"),
        "tie_word_embeddings": False,
    }
    return Tiny(config("idefics2", made, **fields), processor)


def _idefics3() -> Tiny:
    made, fields = _tiled("idefics3")
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    processor = transformers.Idefics3Processor(
        images, made, image_seq_len=1, chat_template=idefics3_chat_template
    )
    return Tiny(config("idefics3", made, **fields), processor)


def _smolvlm() -> Tiny:
    made, fields = _tiled("smolvlm")
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    processor = transformers.SmolVLMProcessor(
        images,
        made,
        transformers.SmolVLMVideoProcessor(),
        image_seq_len=1,
        chat_template=smolvlm_chat_template,
    )
    return Tiny(config("smolvlm", made, **fields), processor)


def _tiled(model_type: str) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """Idefics3 and SmolVLM2: 2 x 2 tiles and the whole image."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    made = tokenizer(special, eos="<end_of_utterance>", pad="<|im_end|>", bos="<|im_start|>")
    fields = {
        "vision_config": TOWER,
        "text_config": text(made, "llama"),
        "scale_factor": 2,
        "image_token_id": token(made, "<image>"),
        "tie_word_embeddings": False,
    }
    return made, fields


def _qwen(model_type: str) -> Tiny:
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    made = tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")
    third = model_type == "qwen3_vl"
    side = 32 if third else 28
    pixels = {
        "size": {"shortest_edge": side * side, "longest_edge": 4 * side * side},
        "patch_size": side // 2,
        "merge_size": 2,
    }
    video, processor = (
        (transformers.Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor)
        if third
        else (
            transformers.Qwen2VLVideoProcessor,
            transformers.Qwen2VLProcessor if model_type == "qwen2_vl" else transformers.Qwen2_5_VLProcessor,
        )
    )
    tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": side // 2, "spatial_merge_size": 2}
    if model_type == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    if third:
        tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    if model_type == "qwen2_5_vl":
        tower |= {"window_size": 2 * side, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    text_type = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text"}
    fields = {
        "vision_config": tower,
        "text_config": text(made, text_type[model_type], rope_parameters=rope),
        "image_token_id": token(made, "<|image_pad|>"),
        "video_token_id": token(made, "<|video_pad|>"),
        "vision_start_token_id": token(made, "<|vision_start|>"),
        "vision_end_token_id": token(made, "<|vision_end|>"),
        "tie_word_embeddings": third,
    }
    template = qwen3_vl_chat_template if third else qwen2_5_vl_chat_template
    images = transformers.Qwen2VLImageProcessorPil(**pixels)
    return Tiny(
        config(model_type, made, **fields), processor(images, made, video(**pixels), chat_template=template)
    )


def _llava() -> Tiny:
    made = tokenizer(["<image>"], eos="</s>", pad="<pad>", bos="<s>")
    side = {"height": 28, "width": 28}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        made,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    fields = {
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "text_config": text(made, "llama"),
        "image_token_index": token(made, "<image>"),
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    return Tiny(config("llava", made, **fields), processor)


def _llava_next() -> Tiny:
    made = tokenizer(["<image>"], eos="</s>", pad="<pad>", bos="<s>")
    grids = [[28, 56], [56, 28], [56, 56]]
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids
    )
    processor = transformers.LlavaNextProcessor(
        images,
        made,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=llava_next_chat_template,
    )
    fields = {
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "text_config": text(made, "mistral"),
        "image_token_index": token(made, "<image>"),
        "image_grid_pinpoints": grids,
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    return Tiny(config("llava_next", made, **fields), processor)


def _llava_onevision() -> Tiny:
    made = tokenizer(["<|im_start|>", "<image>", "<video>"], eos="<|im_end|>", pad="<|endoftext|>")
    grids = [[28, 56], [56, 28], [56, 56]]
    side = {"height": 28, "width": 28}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=grids),
        made,
        transformers.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML_TEMPLATE.replace("IMAGE", "<image>"),
    )
    fields = {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        "text_config": text(made, "qwen2"),
        "image_token_index": token(made, "<image>"),
        "video_token_index": token(made, "<video>"),
        "image_grid_pinpoints": grids,
        "tie_word_embeddings": False,
    }
    return Tiny(config("llava_onevision", made, **fields), processor)


def _paligemma() -> Tiny:
    made = tokenizer([], eos="<eos>", pad="<pad>", bos="<bos>")
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, made)  # adds <image> and 1,152 tokens of its own
    sliding = {"sliding_window": 64, "query_pre_attn_scalar": 16}
    fields = {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "projection_dim": 64,
            **TOWER,
        },
        "text_config": text(made, "gemma2", **sliding),
        "projection_dim": 64,
        "image_token_index": token(made, "<image>"),
    }
    return Tiny(config("paligemma", made, **fields), processor)


def _gemma3() -> Tiny:
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    made = tokenizer(["<start_of_turn>"], eos="<end_of_turn>", pad="<pad>", bos="<bos>", **named)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        made,
        chat_template=gemma3_chat_template,
        image_seq_length=4,
    )
    sliding = {"sliding_window": 64, "query_pre_attn_scalar": 16}
    fields = {
        "vision_config": {
            "model_type": "siglip_vision_model",
            **TOWER,
            "image_size": 56,
            "vision_use_head": False,
        },
        "text_config": text(made, "gemma3_text", **sliding),
        "mm_tokens_per_image": 4,
        "boi_token_index": token(made, "<start_of_image>"),
        "eoi_token_index": token(made, "<end_of_image>"),
        "image_token_index": token(made, "<image_soft_token>"),
    }
    return Tiny(config("gemma3", made, **fields), processor)


def _internvl() -> Tiny:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    made = tokenizer(["<|im_start|>"], eos="<|im_end|>", pad="<|endoftext|>", **named)
    side = {"height": 56, "width": 56}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, max_patches=2),
        made,
        transformers.InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=CHATML_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    fields = {
        "vision_config": {**TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
        "text_config": text(made, "qwen2"),
        "image_token_id": token(made, "<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }
    return Tiny(config("internvl", made, **fields), processor)


def _mistral3() -> Tiny:
    made, processor = _pixtral_processor(spatial_merge_size=2)
    fields = {
        "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 56, "head_dim": 16},
        "text_config": text(made, "mistral"),
        "image_token_index": token(made, "[IMG]"),
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }
    return Tiny(config("mistral3", made, **fields), processor)


def _pixtral() -> Tiny:
    made, processor = _pixtral_processor(spatial_merge_size=1)
    fields = {
        "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 56, "head_dim": 16},
        "text_config": text(made, "mistral"),
        "image_token_index": token(made, "[IMG]"),
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_seq_length": 1,
        "tie_word_embeddings": False,
    }
    return Tiny(config("llava", made, **fields), processor)


def _pixtral_processor(spatial_merge_size: int) -> tuple[PreTrainedTokenizerFast, ProcessorMixin]:
    special = [
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
    ]
    made = tokenizer(special, eos="</s>", pad="<pad>", bos="<s>")
    images = transformers.PixtralImageProcessorPil(
        size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}
    )
    processor = transformers.PixtralProcessor(
        images, made, patch_size=14, spatial_merge_size=spatial_merge_size, chat_template=PIXTRAL_TEMPLATE
    )
    return made, processor


MAKERS: dict[str, Callable[[], Tiny]] = {
    "gemma3": _gemma3,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "pixtral": _pixtral,
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "smolvlm": _smolvlm,
}
NEED_TORCHVISION = frozenset(
    {
        "internvl",
        "llava_onevision",
        "mistral3",
        "pixtral",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""Their processors need it for videos, or say that they do, even with `image_backend: pil`."""


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """A model folder with float32 weights, the same for a seed."""
    tiny = MAKERS[name]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny.config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # Gemma 3's projection: no gradient would pass it
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder
