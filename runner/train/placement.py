"""The strategies: what TRL's configuration says, so that Accelerate places the model as the plan wants it.

    strategy          engine                       each process holds
    single            -                            everything
    ddp               DistributedDataParallel      everything; gradients are averaged
    zero1             DeepSpeed, stage 1           weights and gradients; its part of the optimizer's state
    zero2             DeepSpeed, stage 2           weights; its part of gradients and optimizer's state
    zero3             DeepSpeed, stage 3           its part of all three
    fsdp2             PyTorch's `fully_shard`      its part of all three

A CPU silently runs another engine than was asked for: `check` looks at the one that is in force.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, is_compiled_module
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from runner.errors import DataError, RunnerError
from runner.plan import Plan, Strategy
from runner.train.data.rows import Rows
from runner.train.gathering import trainable
from runner.train.models.model import DTYPES
from runner.train.world import device

STAGES: dict[Strategy, int] = {"zero1": 1, "zero2": 2, "zero3": 3}

SHARDED: tuple[Strategy, ...] = ("zero3", "fsdp2")
"""Each process holds a part of the weights: a forward is a collective."""

SHARED_MEMORY = "deepspeed_shm_comm"
"""Name of DeepSpeed's operator that is compiled when it is first used."""

ENGINES: dict[Strategy, tuple[DistributedType, str]] = {
    "ddp": (DistributedType.MULTI_GPU, "DistributedDataParallel"),
    "zero1": (DistributedType.DEEPSPEED, "DeepSpeedEngine"),
    "zero2": (DistributedType.DEEPSPEED, "DeepSpeedEngine"),
    "zero3": (DistributedType.DEEPSPEED, "DeepSpeedEngine"),
    "fsdp2": (DistributedType.FSDP, "FSDP"),
}
"""What has to be in force: Accelerate's type, and the beginning of the wrapper's class name."""


def arguments(plan: Plan) -> dict[str, Any]:
    """Fields of TrainingArguments, its precision among them: DeepSpeed's own would cast the adapters."""
    dtype = plan.job.model.dtype
    precision = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    if plan.strategy in STAGES:
        return {"deepspeed": _deepspeed(STAGES[plan.strategy], dtype), "bf16": False, "fp16": False}
    if plan.strategy == "fsdp2":
        return {**precision, "fsdp": True, "fsdp_config": _FSDP2}
    if plan.strategy == "ddp":
        return {**precision, "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    return precision


_FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
}


def _deepspeed(stage: int, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Whatever TrainingArguments knows is `auto`, which takes it from there."""
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if stage == 3:
        # Persistent parameters are gathered together, as if they were of one type; float32 adapters and a
        # bfloat16 base are of two (DeepSpeed 0.19, issue 8072).
        zero["stage3_param_persistence_threshold"] = 0
    autocast = {"enabled": dtype != "float32", "dtype": dtype}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": False},  # it would hold the adapters in bfloat16, in memory and in checkpoints
        "fp16": {"enabled": False},
        **({"torch_autocast": autocast} if autocast["enabled"] else {}),
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@contextlib.contextmanager
def whole(built: TrainingArguments) -> Iterator[None]:
    """Inside, models are loaded whole, and run without an engine.

    transformers and TRL look at a global configuration of DeepSpeed, and would take them for partitioned.
    """
    if built.deepspeed is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(built.hf_deepspeed_config)


def prepare(plan: Plan, built: TrainingArguments) -> None:
    """After TrainingArguments, before the trainer: what they have no field for.

    fsdp2              what a module returns stays as it is: accelerate (1.15) would round the loss to the
                       model's type
    fsdp2 on a CPU     shards, where accelerate would run DDP
    zero* on a CPU     compiles nothing: DeepSpeed (0.19) builds its reduction for processes that share memory
                       in a cache of the user's, and a rank that is killed meanwhile leaves a lock there that
                       all later ones wait for; gloo reduces instead
    """
    on_cpu = device().type == "cpu"
    if plan.strategy == "fsdp2" and built.mixed_precision != "no":
        # Gradients are summed in the same type: in another, PyTorch (2.13) fails at the tower, which takes no
        # part in the backward pass.
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[plan.job.model.dtype])
        built.fsdp_plugin_args["mixed_precision_policy"] = policy
    if plan.strategy == "fsdp2" and on_cpu:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    elif plan.strategy in STAGES and on_cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False


def settle(trainer: Trainer) -> None:
    """Have DDP cut its buckets as they stay in the first forward pass; nothing of other engines. Collective.

    PyTorch (2.13) sums all gradients of a process's first step in one bucket, in the order of registration,
    and those of later steps in buckets of the order in which they came. Where a gradient lies in a bucket
    says in which order more than two ranks add it: the first step after a resume would round otherwise than
    the same step of the undisturbed run. So gradients come once without a forward pass, in the reverse order
    of registration, which is about that of a backward pass: the buckets still overlap with one, and depend on
    the model alone.
    """
    placed = _placed(trainer)
    if not isinstance(placed, DistributedDataParallel):
        return
    placed.reducer.prepare_for_backward([])
    for parameter in reversed(trainable(placed).values()):
        parameter.sum().backward()
    placed.zero_grad(set_to_none=True)


def check_rows(plan: Plan, train: Rows | None, evaluation: Rows | None) -> None:
    """Refuse rows without an image where a process that has none in its batch leaves the others waiting.

        strategy             freeze                     refused
        single               any                        -
        ddp, zero1, zero2    vision_tower, projector    -
        ddp, zero1, zero2    less                       in train: their gradients are summed by all
        zero3, fsdp2         any                        in train or eval, among rows with images: the
                                                        weights are gathered by all

    Raises:
        DataError: there are such rows.
    """
    if plan.strategy == "single":
        return
    training = [part for part in ("vision_tower", "projector") if part not in plan.job.model.freeze]
    sharded = plan.strategy in SHARDED
    if sharded:
        reason = "a part of it is on every process, and all have to take part in every forward of its tower"
        remedy = "launch.strategy: ddp, or only rows with images"
    else:
        reason = f"{' and '.join(training)} would train, whose gradients all have to sum in every step"
        remedy = "model.freeze: [vision_tower, projector], launch.strategy: single, or only rows with images"
    for name, rows in (("train", train), ("eval", evaluation if sharded else None)):
        if rows is None or not (sharded or training):
            continue
        counts = rows.dataset.with_format("numpy", columns=["image_count"])["image_count"][:]
        if not counts.all() and (counts.any() or not sharded):
            first = rows.dataset[int((counts == 0).argmax())]["row"]
            raise DataError(
                f"datasets.{name}: {first} has no image, and launch.strategy: {plan.strategy} needs one in "
                f"every row: {reason}. Remedy: {remedy}"
            )


def _placed(trainer: Trainer) -> torch.nn.Module:
    """What the strategy made of the model; of `torch_compile`, only DDP's module lies inside its wrapper."""
    wrapped = trainer.model_wrapped
    inner = wrapped._orig_mod if is_compiled_module(wrapped) else wrapped
    return inner if isinstance(inner, DistributedDataParallel) else wrapped


def engine(trainer: Trainer) -> dict[str, Any]:
    """What is in force, as result.json records it."""
    stage = None
    placed = _placed(trainer)
    if trainer.is_deepspeed_enabled and placed is not trainer.model:
        stage = placed.zero_optimization_stage()
    return {
        "engine": type(placed).__name__,
        "zero_stage": stage,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
    }


def check(trainer: Trainer, strategy: Strategy) -> None:
    """Look at the engine that trains.

    Raises:
        RunnerError: it is another one than the plan's.
    """
    if strategy == "single":
        return
    found = engine(trainer)
    wanted, name = ENGINES[strategy]
    types = {wanted.value} | ({DistributedType.MULTI_CPU.value} if strategy == "ddp" else set())
    if (
        found["distributed_type"] not in types
        or not found["engine"].startswith(name)
        or found["zero_stage"] != STAGES.get(strategy)
    ):
        raise RunnerError(
            f"launch.strategy: {strategy} is planned, and {found} is in force; this is a defect of the "
            "runner; remedy: another launch.strategy, and a report of this message"
        )
