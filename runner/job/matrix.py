"""The compatibility matrix: combinations of valid keys that cannot work. Pure.

What upstream can do is not refused; tests/test_matrix.py shows upstream refusing the rows.

It reads the merged mapping and not a `Job`, so that one report holds these problems together with unknown
keys and wrong types; a value of an unexpected type matches no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.job.cells import Section, is_count, is_number, texts
from runner.job.matrix_adapters import adapted, quantized
from runner.job.matrix_evaluation import evaluated
from runner.job.matrix_strategies import split
from runner.job.shape import Finding
from runner.manifest import FORMATS, PAIRS, SORTING
from runner.plan import sizes

HAS_F_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Values of DPOConfig.loss_type that DPOTrainer takes with another f_divergence_type than reverse_kl."""


def refusals(job: dict[str, Any]) -> Iterator[Finding]:
    """Every row that the job matches.

    method
        dpo                                            x a format without pairs   nothing to prefer
        sft                                            x a format of pairs        which of the two is learned?
        dpo                                            x evaluation.metric: relaxed_accuracy, exact_match
        sft                                            x evaluation.metric: preference_accuracy
    vision (rows of any format may have images)
        training.packing, eval_packing, padding_free   x images      SFTTrainer raises
        training.pad_to_multiple_of: a number          x images      TRL's collator raises
    quantization
        load_in_4bit and load_in_8bit                                BitsAndBytesConfig raises
        neither                                                      nothing would be quantized, silently
        quantization                                   x lora: null  quantized weights cannot be trained
        model.dtype: float16                           x lora: null  GradScaler refuses float16 gradients
    lora
        target_modules with lm_head                    x fused head  SFTTrainer raises
        target_modules, modules_to_save of a part      x freeze      would train what is frozen
        init_lora_weights: pissa, mica, loftq          x quantized   PEFT raises: needs the float weights
        init_lora_weights: orthogonal                  x quantized, not stored as floats   PyTorch raises
        init_lora_weights: eva, corda, lora_ga                       needs a pass over the data first
        init_lora_weights: pissa_niter_*                             another adapter when loaded again
        init_lora_weights: orthogonal                  x odd r       PEFT raises
        init_lora_weights: loftq                       x no loftq_config   PEFT raises
        lora_bias                                      x use_dora, other init   PEFT raises
        velora_config                                                state outside the parameters: no resume
        bias: all, lora_only                           x method dpo  PEFT raises: it cannot be copied
        layers_to_transform, layers_pattern            x target_modules: text   PEFT raises
        layers_pattern                                 x no layers_to_transform   PEFT raises
    training
        global_batch_size not a multiple of per_device_train_batch_size   no accumulation gives it
        per_device_train_batch_size: auto              x loss_type: aot, aot_unpaired   sorts a micro-batch
        loss_weights                                   x as many loss_type   DPOConfig raises otherwise
        loss_type: exo_pair                            x label_smoothing: 0   DPOTrainer raises
        f_divergence_type but reverse_kl               x loss_type without one   DPOTrainer raises
        use_weighting                                  x loss_type: aot, aot_unpaired, sft   DPOTrainer raises
        lr_scheduler_type: reduce_lr_on_plateau, greedy   x eval_strategy: no   TrainingArguments raises
        lr_scheduler_type: cosine_*with_min_lr         x no min_lr   raises when the schedule is made
        dataloader_prefetch_factor, _persistent_workers   x no workers   raises
        logging_steps, eval_steps above 1              x a fraction  TrainingArguments raises
        liger_kernel_config.fused_linear_cross_entropy x fused head  SFTTrainer raises
    evaluation
        evaluation, training.eval_strategy, eval_on_start   x no datasets.eval
        metric, metric_for_best_model of one answer    x method dpo; of two answers x method sft
        metric_for_best_model: reward_accuracy         x baseline: false        has nothing to reward against
        metric_for_best_model: loss                    x loss: false
        metric_for_best_model                          x no steps, no minutes   nothing to choose from
        early_stopping_patience                        x no metric_for_best_model
        steps                                          x minutes
    launch.strategy (auto is never refused: it takes ddp)
        zero1, zero2, zero3, fsdp2   x optim with a state of another shape   cannot be saved, or not resumed
        fsdp2                        x optim of bitsandbytes                 PyTorch raises
        zero1, zero2, zero3          x model.dtype: float16                  gradients overflow, silently
        zero3                        x use_dora, quantized                   PEFT raises
        fsdp2                        x bnb_4bit_quant_storage: other floats  packed weights would be cast
        fsdp2                        x load_in_8bit                          bitsandbytes raises
        fsdp2                        x lora: null, modules_to_save: lm_head  wrong gradients, silently
    """
    training, lora, quantization = (
        _section(job, "training"),
        _section(job, "lora"),
        _section(job, "quantization"),
    )
    yield from _formats(job)
    yield from _vision(training)
    if isinstance(job.get("quantization"), dict):
        yield from quantized(quantization, has_lora=job.get("lora") is not None)
    if job.get("lora") is None and _section(job, "model").get("dtype") == "float16":
        reason = "full fine-tuning in float16: the gradient scaler refuses float16 gradients"
        yield Finding(("model", "dtype"), reason, "use bfloat16 or float32, or add a lora section")
    yield from adapted(lora, quantization, freeze=_freeze(job))
    yield from _batch(training)
    if job.get("method") == "dpo":
        yield from _preference(training)
        if lora.get("bias") in ("all", "lora_only"):
            reason = "biases have no copy for a reference: method dpo would prefer against what it trains"
            yield Finding(("lora", "bias"), reason, "remove it")
    yield from evaluated(job, training)
    yield from split(
        _section(job, "launch").get("strategy"),
        model=_section(job, "model"),
        training=training,
        quantization=quantization,
        lora=None if job.get("lora") is None else lora,
    )
    yield from _schedule(training)


def _formats(job: dict[str, Any]) -> Iterator[Finding]:
    method, datasets = job.get("method", "sft"), _section(job, "datasets")
    for part in ("train", "eval"):
        sources = datasets.get(part)
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            format = source.get("format") if isinstance(source, dict) else None
            path = ("datasets", part, index, "format")
            if method == "dpo" and format in FORMATS and format not in PAIRS:
                reason = f"method dpo learns from pairs of answers, and {format} has one answer a row"
                yield Finding(path, reason, f"use {' or '.join(PAIRS)}, or method: sft")
            elif method == "sft" and format in PAIRS:
                reason = f"method sft learns from one answer a row, and {format} has two"
                yield Finding(path, reason, "use method: dpo, or a format with one answer")


def _vision(training: Section) -> Iterator[Finding]:
    for key in ("packing", "eval_packing", "padding_free"):
        if training.get(key) is True:
            reason = "rows with images cannot be packed: their image tensors belong to one row each"
            yield Finding(("training", key), reason, "remove it; raise per_device_train_batch_size instead")
    if is_number(training.get("pad_to_multiple_of")):
        reason = "padding to a multiple is not implemented for rows with images"
        yield Finding(("training", "pad_to_multiple_of"), reason, "remove it")


def _batch(training: Section) -> Iterator[Finding]:
    total = training.get("global_batch_size", 8)
    per_device = training.get("per_device_train_batch_size", "auto")
    if is_count(total) and is_count(per_device) and total % per_device:
        reason = f"{per_device} per device does not divide global_batch_size {total}"
        usable = next(size for size in sizes(total) if size <= per_device)
        remedy = f"use {usable}, or another divisor"
        yield Finding(("training", "per_device_train_batch_size"), reason, remedy)
    sorting = next((loss for loss in texts(training.get("loss_type")) if loss in SORTING), None)
    if per_device == "auto" and sorting is not None:
        reason = f"loss_type {sorting} sorts the pairs of a micro-batch, so its size is part of the loss"
        remedy = "write the number of pairs that shall be sorted together"
        yield Finding(("training", "per_device_train_batch_size"), reason, remedy)


def _preference(training: Section) -> Iterator[Finding]:
    losses, weights = texts(training.get("loss_type", "sigmoid")), training.get("loss_weights")
    if isinstance(weights, list) and len(weights) != len(losses):
        reason = f"{len(weights)} weights for {len(losses)} losses ({', '.join(losses)})"
        yield Finding(("training", "loss_weights"), reason, "write one weight for each entry of loss_type")
    if "exo_pair" in losses and training.get("label_smoothing", 0) == 0:
        reason = "exo_pair compares with smoothed labels, and label_smoothing is 0"
        yield Finding(("training", "loss_type"), reason, "add label_smoothing: 1e-3, as its paper has it")
    divergence = training.get("f_divergence_type", "reverse_kl")
    without = [loss for loss in losses if loss not in HAS_F_DIVERGENCE]
    if divergence != "reverse_kl" and without:
        reason = f"{', '.join(without)} is defined for reverse_kl alone"
        remedy = f"remove it, or use the losses {', '.join(HAS_F_DIVERGENCE)}"
        yield Finding(("training", "f_divergence_type"), reason, remedy)
    unweighted = [loss for loss in losses if loss in (*SORTING, "sft")]
    if training.get("use_weighting") is True and unweighted:
        reason = f"{', '.join(unweighted)} has no loss of a single pair that could be weighted"
        yield Finding(("training", "use_weighting"), reason, "remove it, or use other losses")


def _schedule(training: Section) -> Iterator[Finding]:
    schedule, arguments = training.get("lr_scheduler_type"), training.get("lr_scheduler_kwargs")
    if schedule in ("reduce_lr_on_plateau", "greedy") and training.get("eval_strategy", "no") == "no":
        reason = f"{schedule} follows the evaluation loss, and eval_strategy is no"
        yield Finding(("training", "lr_scheduler_type"), reason, "set eval_strategy, or use another schedule")
    given = set(arguments) if isinstance(arguments, dict) else set()
    needs_floor = schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not isinstance(
        arguments, str
    )
    if needs_floor and not given & {"min_lr", "min_lr_rate"}:
        remedy = "add lr_scheduler_kwargs: {min_lr_rate: 0.1}"
        yield Finding(("training", "lr_scheduler_type"), f"{schedule} needs min_lr or min_lr_rate", remedy)
    if training.get("dataloader_num_workers", 0) == 0:
        for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if training.get(key):
                yield Finding(
                    ("training", key),
                    "there are no data loader workers",
                    "set dataloader_num_workers, or remove it",
                )
    for key in ("logging_steps", "eval_steps"):
        steps = training.get(key)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            reason = f"{steps} is neither a number of steps nor a share of them"
            yield Finding(("training", key), reason, "use a whole number, or a share below 1")
    liger = training.get("liger_kernel_config")
    if isinstance(liger, dict) and liger.get("fused_linear_cross_entropy"):
        reason = "it replaces the model's forward, which TRL patches with a fused head of its own"
        yield Finding(("training", "liger_kernel_config", "fused_linear_cross_entropy"), reason, "remove it")


def _section(job: dict[str, Any], name: str) -> Section:
    section = job.get(name)
    return section if isinstance(section, dict) else {}


def _freeze(job: dict[str, Any]) -> list[str]:
    freeze = _section(job, "model").get("freeze", ["vision_tower", "projector"])
    return [part for part in freeze if isinstance(part, str)] if isinstance(freeze, list) else []
