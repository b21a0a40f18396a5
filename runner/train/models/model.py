"""The model of a job: loaded, quantized where it trains, frozen where it does not, with its adapter.

Frozen means frozen: a frozen vision tower or projector holds no quantized module and no adapter, and its
forward runs without autograd, so that it receives no backward call. Adapters are float32. What is really
in force is read back from the modules by `describe`, never repeated from the job.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_backends import PilBackend

from runner.errors import DataError, JobError, Problem
from runner.manifest import Job
from runner.train.memory import is_out_of_memory
from runner.train.models.architectures import PARTS, Parts, parts
from runner.train.world import device

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_config(folder: str) -> Any:
    """The model's configuration.

    Raises:
        DataError: the folder holds no model that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"model: cannot read a configuration in {folder}: {error}") from error


def load_processor(job: Job, folder: str) -> ProcessorMixin:
    """The processor, with the job's keyword arguments and image back end.

    Raises:
        DataError: it cannot be built, or it has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, **job.model.processor)
        if isinstance(processor, ProcessorMixin):
            # Given to AutoProcessor, `backend` reaches the tokenizer, which then takes itself for a slow one.
            processor.image_processor = AutoImageProcessor.from_pretrained(
                folder, backend=job.model.image_backend, **job.model.processor
            )
    except ImportError as error:
        raise DataError(
            f"model: cannot build the processor in {folder}: {str(error).strip()} Remedy: install what it "
            "names; torchvision comes with pip install 'vlm-runner[gpu]'"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"model: cannot build the processor in {folder}: {error}") from error
    if not isinstance(processor, ProcessorMixin):
        raise DataError(
            f"model: {folder} has a {type(processor).__name__} and no processor for images; "
            "remedy: name a vision-language model"
        )
    fit = parts(load_config(folder).model_type).fit
    if fit is not None:
        processor = fit(processor)
    if processor.chat_template is None:
        raise DataError(
            f"model: the processor in {folder} has no chat template; remedy: name a model that was tuned for "
            "conversations, or put a chat_template.jinja into its folder"
        )
    found = image_backend(processor)
    if found != job.model.image_backend:
        raise DataError(
            f"model.image_backend: {job.model.image_backend} is not to be had here, "
            f"{type(processor.image_processor).__name__} uses {found}; remedy: install torchvision, or write "
            f"image_backend: {found}"
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels mask padding by position, not by id
    return processor


def image_backend(processor: ProcessorMixin) -> str:
    """The image back end in force: transformers falls back to the other one with no more than a log line."""
    return "pil" if isinstance(processor.image_processor, PilBackend) else "torchvision"


def load_base(job: Job, folder: str, *, sharded: bool = False) -> PreTrainedModel:
    """The base model on its device, quantized outside the frozen parts, tower and projector without autograd.

    Args:
        sharded: whether an engine will split its weights.

    Raises:
        DataError: no such architecture, or the weights do not load.
        JobError: transformers refuses the quantization.
    """
    config = load_config(folder)
    where = parts(config.model_type)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=DTYPES[job.model.dtype],
            attn_implementation=job.model.attn_implementation,
            quantization_config=quantization(job, where, sharded=sharded),
            device_map={"": device()},
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"model: cannot load {job.model.name_or_path} from {folder} with attn_implementation "
            f"{job.model.attn_implementation}: {error}"
        ) from error
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode this path repacks the weight and then runs without autograd: training after an
            # evaluation would silently lose the input gradient (bitsandbytes 0.50.2, CPUs with AVX512-BF16).
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_with_scales)
    if job.lora is None:
        model.requires_grad_(True)
    freeze(model, where.of(list(job.model.freeze)))
    return model


def _with_scales(module: Linear8bitLt, _inputs: object) -> None:
    """Give an 8-bit weight its scales back: on a CPU, PEFT (0.21.2) wraps it anew whenever DoRA dequantizes
    it, without them, and bitsandbytes (0.50.2) then forgets those that it had."""
    if module.weight.CB is not None and module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


def quantization(job: Job, where: Parts, *, sharded: bool = False) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration; what is frozen, and the head that TRL multiplies raw, stays as it is.

    Engines split floats alone: for them the same bits are stored as such (`bnb_4bit_quant_storage`).
    """
    if job.quantization is None:
        return None
    options = dict(job.quantization)
    skipped = [
        *(options.get("llm_int8_skip_modules") or []),
        *where.of(list(job.model.freeze)),
        where.lm_head,
    ]
    options["llm_int8_skip_modules"] = list(dict.fromkeys(skipped))
    if options.get("load_in_4bit"):
        options.setdefault("bnb_4bit_compute_dtype", job.model.dtype)  # upstream's default is float32
        if sharded:
            options.setdefault("bnb_4bit_quant_storage", job.model.dtype)
    try:
        return BitsAndBytesConfig(**options)
    except (TypeError, ValueError) as error:
        raise JobError(
            [
                Problem(
                    "quantization",
                    f"transformers refuses it: {error}",
                    "see BitsAndBytesConfig's own documentation",
                )
            ]
        ) from error


def freeze(model: PreTrainedModel, paths: list[str]) -> None:
    """No gradient in the parts at `paths`, and no autograd in their forward where nothing before them trains.

    Input-require-grads hooks make image embeddings require a gradient, so a tower that is merely not
    trained would still run backward (2.2 times the step at SmolVLM's proportions).
    """
    stop_gradients(model, paths)
    where = parts(model.config.model_type)
    # The projector lies behind the tower: without autograd it would cut off a tower that trains.
    if set(where.vision_tower) <= set(paths):
        for path in paths:
            for module in _modules(model, path):
                module.forward = torch.no_grad()(module.forward)


def stop_gradients(model: PreTrainedModel, paths: list[str]) -> None:
    """No parameter at or below `paths` trains."""
    for path, parameter in model.named_parameters():
        if any(path == prefix or path.startswith(f"{prefix}.") for prefix in paths):
            parameter.requires_grad_(False)


def _modules(model: PreTrainedModel, path: str) -> list[torch.nn.Module]:
    """What a forward call at a path of the table goes through; nothing at a lone parameter."""
    parent, _, name = path.rpartition(".")
    if name in dict(model.get_submodule(parent).named_parameters(recurse=False)):
        return []
    module = model.get_submodule(path)
    return list(module) if isinstance(module, torch.nn.ModuleList) else [module]


def add_adapter(model: PreTrainedModel, job: Job) -> PeftModel:
    """A fresh LoRA adapter on what is not frozen.

    Raises:
        JobError: PEFT refuses the configuration, or it matches nothing that may train.
    """
    assert job.lora is not None
    given = {key: value for key, value in job.lora.items() if key != "init_from"}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", **given}
    if options.get("target_modules") is None and options.get("target_parameters") is None:
        options["target_modules"] = "all-linear"  # PEFT knows defaults for a few architectures only
    frozen = parts(model.config.model_type).of(list(job.model.freeze))
    options["exclude_modules"] = _exclude(options.get("exclude_modules"), frozen)
    try:
        adapted = get_peft_model(model, LoraConfig(**options))
    except (TypeError, ValueError, ImportError) as error:
        raise JobError(
            [
                Problem(
                    "lora",
                    f"PEFT refuses target_modules {options.get('target_modules')}: {error}",
                    f"name modules outside the frozen {', '.join(frozen) or 'parts'}, or all-linear",
                )
            ]
        ) from error
    stop_gradients(adapted.get_base_model(), frozen)  # `bias: all` unfreezes what it does not adapt
    # The adapter must load wherever the base model is known by its public name, not by this machine's folder.
    adapted.peft_config["default"].base_model_name_or_path = job.model.name_or_path
    adapted.peft_config["default"].revision = job.model.revision
    return adapted


def _exclude(given: str | list[str] | None, frozen: list[str]) -> str | None:
    """One regular expression over module paths: the job's own exclusions and everything that is frozen."""
    patterns = [rf"{re.escape(path)}(\..*)?" for path in frozen]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns.extend(rf"(.*\.)?{re.escape(name)}" for name in given)
    return "|".join(f"(?:{pattern})" for pattern in patterns) or None


def load_adapter(
    model: PreTrainedModel, folder: Path, *, named: str = "adapter", config: LoraConfig | None = None
) -> PeftModel:
    """A finished adapter over the base model, the whole of it.

    Args:
        named: what the job or the command line calls it.
        config: to train it further; None to evaluate.

    Raises:
        DataError: the folder holds no adapter for this model.
    """
    trains = config is not None
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trains, config=config)
        # Again, for what it returns: PEFT (0.21.2) only warns of parameters that the file does not have, and
        # is silent about those that the model does not have.
        found = adapted.load_adapter(str(folder), "default", is_trainable=trains)
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{named}: cannot load {folder}: {error}") from error
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise DataError(
            f"{named}: the parameters in {folder} are not this model's; the first of {len(odd)} is {odd[0]}"
        )
    return adapted


def float32_trainable(model: torch.nn.Module) -> None:
    """Adapters train in float32 from the first step on; TRL casts them to bfloat16 over a quantized base."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_frozen(model: torch.nn.Module, frozen: list[str]) -> None:
    """Look at the modules themselves, before hours are spent on them.

    Raises:
        JobError: a frozen part holds a quantized module, an adapter or a trainable parameter.
    """
    counted = describe(model)["parts"]
    for part in frozen:
        if any(counted[part].values()):
            held = ", ".join(f"{count} {what}" for what, count in counted[part].items() if count)
            remedy = f"name other modules in lora, or take {part} out of model.freeze"
            raise JobError([Problem("model.freeze", f"the frozen {part} holds {held}", remedy)])


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What is really in force, counted on the modules: quantized and adapted per part, trainable."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    where = parts(base.config.model_type)
    count = {name: {"linear4bit": 0, "linear8bit": 0, "adapted": 0, "trainable": 0} for name in PARTS}
    for path, module in base.named_modules():
        if (part := where.part_of(path)) is not None:
            count[part]["linear4bit"] += isinstance(module, Linear4bit)
            count[part]["linear8bit"] += isinstance(module, Linear8bitLt)
            count[part]["adapted"] += isinstance(module, BaseTunerLayer)
    for path, parameter in base.named_parameters():
        if (part := where.part_of(path)) is not None and parameter.requires_grad:
            count[part]["trainable"] += parameter.numel()
    return {
        "model_class": type(base).__name__,
        "parts": count,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trainable_dtypes": sorted(
            {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
        ),
        "attn_implementation": base.config._attn_implementation,
        "device": str(base.device),
    }
