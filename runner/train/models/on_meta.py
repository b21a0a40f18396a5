"""A job's model on the meta device: shapes and no numbers, so that counts are exact and nothing is read.

The configuration makes the model, transformers' own rule says what bitsandbytes would pack, and PEFT adds the
adapter as it does for training. A 4-bit weight of n numbers is n / 2 bytes with a scale for every 64 of them:
float32, or with double quantization one byte and, for every 256 of those, a float32, and one more float32 for
all (Dettmers et al., QLoRA, arXiv 2305.14314, section 3). An 8-bit weight has a float32 scale for each row.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from runner.errors import DataError
from runner.facts import ModelFacts, Part, Stack
from runner.manifest import Job
from runner.train.models import adapter
from runner.train.models import model as models
from runner.train.models.architectures import PARTS, parts

_BLOCK = 64
_NESTED = 256
_IN_TORCH = ("sdpa", "eager")
"""Attention that needs nothing installed; any other may be there only where the job trains."""


def inspect(job: Job, folder: str, start: Path | None) -> tuple[ModelFacts, int]:
    """The facts of a job's model, and the bytes of its base in memory.

    Args:
        folder: of the configuration.
        start: where `lora.init_from` lies.

    Raises:
        DataError: transformers does not know the model, or `start` does not fit.
        JobError: transformers, bitsandbytes or PEFT refuses an option.
    """
    base = _built(job, folder)
    where = parts(base.config.model_type)
    options = models.quantization(job, where)
    packed = _packed(base, options)
    originals = {id(value): name for name, value in base.named_parameters()}
    base.requires_grad_(job.lora is None)
    models.stop_gradients(base, where.of(list(job.model.freeze)))
    model = base if job.lora is None else adapter.without_values(base, job, start)
    models.check_frozen(model, list(job.model.freeze))

    counts = {part: {"parameters": 0, "quantized": 0, "trainable": 0, "adapter": 0} for part in PARTS}
    total = 0
    for path, value in base.named_parameters():
        count = counts[where.part_of(path) or PARTS[-1]]
        original = originals.get(id(value))
        if original is None:
            count["adapter"] += value.numel() if value.requires_grad else 0
            continue
        is_packed = original in packed
        count["parameters"] += value.numel()
        count["quantized"] += value.numel() if is_packed else 0
        count["trainable"] += value.numel() if value.requires_grad else 0
        total += _bytes(value, options if is_packed else None)
    head = base.get_output_embeddings().weight
    buffers = sum(buffer.nbytes for buffer in base.buffers())
    facts = ModelFacts(
        model_type=base.config.model_type,
        model_class=type(base).__name__,
        parts={part: Part(**count) for part, count in counts.items()},
        text=_stack(base.config.get_text_config()),
        vision=_vision(base.config),
        vocabulary=head.shape[0],
        tied_head=head is base.get_input_embeddings().weight,
        adapted_inputs=sum(
            module.in_features for module in base.modules() if isinstance(module, BaseTunerLayer)
        ),
        buffers=buffers,
    )
    return facts, total + buffers


def _built(job: Job, folder: str) -> PreTrainedModel:
    config = models.load_config(folder)
    parts(config.model_type)  # an unknown architecture is told as one
    attention = job.model.attn_implementation
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                config,
                dtype=models.DTYPES[job.model.dtype],
                attn_implementation=attention if attention in _IN_TORCH else "eager",
            )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"model: cannot build {job.model.name_or_path} from {folder} with attn_implementation "
            f"{attention}: {error}"
        ) from error


def _packed(model: PreTrainedModel, options: BitsAndBytesConfig | None) -> set[str]:
    """Names of the weights that bitsandbytes would pack, as transformers decides when it loads them."""
    if options is None:
        return set()
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, options.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(path, skipped)
    }


def _bytes(value: torch.nn.Parameter, options: BitsAndBytesConfig | None) -> int:
    """Of one parameter of the base in memory.

    Args:
        options: None for one that is not packed.
    """
    if options is None:
        return value.numel() * (4 if value.requires_grad else value.element_size())
    if options.load_in_8bit:
        return value.numel() + 4 * value.shape[0]
    blocks = math.ceil(value.numel() / _BLOCK)
    nested = options.bnb_4bit_use_double_quant
    scales = blocks + 4 * math.ceil(blocks / _NESTED) + 4 if nested else 4 * blocks
    return math.ceil(value.numel() / 2) + scales


def _stack(config: Any) -> Stack:
    heads = config.num_attention_heads
    return Stack(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _vision(config: Any) -> Stack | None:
    """The tower's stack, by the names that its configuration has for it (transformers 5.23).

    layers          num_hidden_layers, depth
    hidden          embed_dim (of Qwen2-VL, whose hidden_size is the text's), hidden_size
    intermediate    intermediate_size, hidden x mlp_ratio
    heads           num_attention_heads, num_heads
    """
    tower = config.vision_config

    def named(*names: str) -> Any:
        return next((found for name in names if (found := getattr(tower, name, None)) is not None), None)

    layers, heads = named("num_hidden_layers", "depth"), named("num_attention_heads", "num_heads")
    hidden = named("embed_dim", "hidden_size")
    intermediate = named("intermediate_size")
    if intermediate is None and hidden is not None and (ratio := named("mlp_ratio")) is not None:
        intermediate = int(hidden * ratio)
    if None in (layers, heads, hidden, intermediate):
        return None
    return Stack(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=heads,
        head_dim=named("head_dim") or hidden // heads,
    )
