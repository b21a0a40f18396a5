"""The rows of the compatibility matrix about `launch.strategy` (`runner.job.matrix`). Pure.

Only of a strategy that the job names: `auto` takes none that a row refuses (`splits`), and ddp trains what
one process does.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.job.cells import Section, texts
from runner.job.matrix_adapters import FLOATS
from runner.job.shape import Finding
from runner.manifest import Job
from runner.plan import Strategy

ZERO = ("zero1", "zero2", "zero3")

OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Optimizers that train, save and resume under zero1, zero2, zero3 and fsdp2."""
OF_BITSANDBYTES = ("lion_32bit", "paged_lion_32bit", "paged_adamw_32bit", "rmsprop_bnb")
"""The same under zero1, zero2 and zero3; fsdp2's tensors reach no kernel of bitsandbytes."""


def splits(job: Job) -> list[Strategy]:
    """What `auto` may take of the strategies that split what a process holds, the simplest first."""
    order: tuple[Strategy, ...] = ("zero2", "zero3")
    return [strategy for strategy in order if not refused(job, strategy)]


def refused(job: Job, strategy: Strategy) -> bool:
    """Whether a row refuses the strategy for the job."""
    found = split(
        strategy,
        model=job.model.model_dump(),
        training=job.training.options,
        quantization=job.quantization or {},
        lora=job.lora,
    )
    return any(found)


def split(
    strategy: object, *, model: Section, training: Section, quantization: Section, lora: Section | None
) -> Iterator[Finding]:
    """Rows of a strategy that splits what a process holds.

    Args:
        lora: null means full fine-tuning.
    """
    if strategy not in (*ZERO, "fsdp2"):
        return
    usable = OF_TORCH if strategy == "fsdp2" else OF_TORCH + OF_BITSANDBYTES
    optimizer = training.get("optim", "adamw_torch_fused")
    if isinstance(optimizer, str) and optimizer not in usable:
        reason = (
            f"{strategy} splits what an optimizer keeps of each weight, and {optimizer} keeps something of "
            "another shape, or is not known to survive it"
        )
        yield Finding(("training", "optim"), reason, f"use {', '.join(usable)}, or launch.strategy: ddp")
    if strategy in ZERO and model.get("dtype") == "float16":
        reason = f"{strategy} has no loss scaler, without which float16 gradients overflow"
        yield Finding(("model", "dtype"), reason, "use bfloat16, or launch.strategy: ddp")
    quantized = any(quantization.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
    if strategy == "zero3" and quantized and lora is not None and lora.get("use_dora") is True:
        reason = "DoRA takes the norm of whole weights, and PEFT cannot gather quantized ones under zero3"
        yield Finding(("lora", "use_dora"), reason, "remove it, or use launch.strategy: zero2")
    if strategy == "fsdp2":
        yield from _fsdp2(model.get("dtype", "bfloat16"), quantization, lora)


def _fsdp2(dtype: object, quantization: Section, lora: Section | None) -> Iterator[Finding]:
    stored = quantization.get("bnb_4bit_quant_storage")
    if stored in FLOATS and dtype not in ("float32", stored):
        reason = f"fsdp2 casts floats to model.dtype ({dtype}), and these are no numbers but packed weights"
        yield Finding(("quantization", "bnb_4bit_quant_storage"), reason, f"remove it, or use {dtype}")
    if quantization.get("load_in_8bit") is True:
        reason = "fsdp2 replaces the weights by its own, which lose what 8-bit ones are scaled by"
        yield Finding(("quantization", "load_in_8bit"), reason, "use load_in_4bit, or launch.strategy: zero3")
    trained = lora is None or any(
        name.split(".")[-1] == "lm_head" for name in texts(lora.get("modules_to_save"))
    )
    if trained:
        reason = "lm_head would train, and its gradients are not averaged over the processes under fsdp2"
        remedy = "use zero3, or adapt other modules only"
        yield Finding(("launch", "strategy"), reason, remedy)
