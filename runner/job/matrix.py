"""The compatibility matrix: combinations of valid keys that cannot work. Pure.

What upstream can do is not refused; tests/test_matrix.py shows upstream refusing the rows.

It reads the merged mapping and not a `Job`, so that one report holds these problems together with unknown
keys and wrong types; a value of an unexpected type matches no row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from runner.job.shape import Finding, show
from runner.manifest import FORMATS, PAIRS, SORTING
from runner.plan import sizes

Section = dict[str, Any]

TOWER_WORDS = ("vision_tower", "vision_model", "visual", "image_encoder", "vision_encoder")
PROJECTOR_WORDS = ("projector", "connector", "modality_projection", "merger", "aligner")
"""How models call the parts that `model.freeze` names."""
INSIDE_THE_TOWER = re.compile(r"\bvisual[.\\]+(deepstack_)?merger")
"""Qwen's projectors, which stand in the module of its tower."""

NOT_ON_QUANTIZED = ("pissa", "mica", "loftq")
FLOATS = ("bfloat16", "float16", "float32", "float64")
NEEDS_A_PASS = ("eva", "corda", "lora_ga")

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
        eval_strategy, eval_on_start, evaluation       x no datasets.eval
        lr_scheduler_type: reduce_lr_on_plateau, greedy   x eval_strategy: no   TrainingArguments raises
        lr_scheduler_type: cosine_*with_min_lr         x no min_lr   raises when the schedule is made
        dataloader_prefetch_factor, _persistent_workers   x no workers   raises
        logging_steps, eval_steps above 1              x a fraction  TrainingArguments raises
        liger_kernel_config.fused_linear_cross_entropy x fused head  SFTTrainer raises
    """
    training, lora, quantization = (
        _section(job, "training"),
        _section(job, "lora"),
        _section(job, "quantization"),
    )
    yield from _formats(job)
    yield from _metric(job)
    yield from _vision(training)
    if isinstance(job.get("quantization"), dict):
        yield from _quantization(quantization, has_lora=job.get("lora") is not None)
    if job.get("lora") is None and _section(job, "model").get("dtype") == "float16":
        reason = "full fine-tuning in float16: the gradient scaler refuses float16 gradients"
        yield Finding(("model", "dtype"), reason, "use bfloat16 or float32, or add a lora section")
    yield from _lora(lora, quantization, freeze=_freeze(job))
    yield from _batch(training)
    if job.get("method") == "dpo":
        yield from _preference(training)
        if lora.get("bias") in ("all", "lora_only"):
            reason = "biases have no copy for a reference: method dpo would prefer against what it trains"
            yield Finding(("lora", "bias"), reason, "remove it")
    yield from _evaluation(job, training)
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


def _metric(job: dict[str, Any]) -> Iterator[Finding]:
    method, metric = job.get("method", "sft"), _section(job, "evaluation").get("metric")
    path = ("evaluation", "metric")
    if method == "dpo" and metric in ("relaxed_accuracy", "exact_match"):
        reason = f"{metric} compares with the one right answer, and pairs of method dpo have none"
        yield Finding(path, reason, "remove it, or use preference_accuracy")
    elif method == "sft" and metric == "preference_accuracy":
        reason = "preference_accuracy compares two answers, and rows of method sft have one"
        yield Finding(path, reason, "remove it, or use relaxed_accuracy or exact_match")


def _vision(training: Section) -> Iterator[Finding]:
    for key in ("packing", "eval_packing", "padding_free"):
        if training.get(key) is True:
            reason = "rows with images cannot be packed: their image tensors belong to one row each"
            yield Finding(("training", key), reason, "remove it; raise per_device_train_batch_size instead")
    if _is_number(training.get("pad_to_multiple_of")):
        reason = "padding to a multiple is not implemented for rows with images"
        yield Finding(("training", "pad_to_multiple_of"), reason, "remove it")


def _quantization(quantization: Section, *, has_lora: bool) -> Iterator[Finding]:
    given = [quantization.get(key, False) for key in ("load_in_4bit", "load_in_8bit")]
    bits = [value for value in given if value is True]
    if len(bits) == 2:
        reason = "load_in_4bit and load_in_8bit are both true"
        yield Finding(("quantization", "load_in_8bit"), reason, "keep one of the two")
    if given == [False, False]:
        reason = "neither load_in_4bit nor load_in_8bit is true, so nothing would be quantized"
        yield Finding(("quantization",), reason, "add load_in_4bit: true, or write quantization: null")
    elif bits and not has_lora:
        reason = "quantized weights cannot be trained, and there is no lora section"
        yield Finding(("quantization",), reason, "add a lora section, or write quantization: null")


def _lora(lora: Section, quantization: Section, *, freeze: list[str]) -> Iterator[Finding]:
    targets = lora.get("target_modules")
    if any(_matches(target, "lm_head", is_pattern=isinstance(targets, str)) for target in _texts(targets)):
        reason = "an adapter on lm_head would never train: TRL multiplies its weight directly"
        yield Finding(
            ("lora", "target_modules"),
            reason,
            "leave lm_head out",
        )
    for key in ("target_modules", "modules_to_save"):
        for part, words in (("vision_tower", TOWER_WORDS), ("projector", PROJECTOR_WORDS)):
            named = next((text for text in _texts(lora.get(key)) if _names(text, words)), None)
            if named is not None and part in freeze and not re.search(r"\(\?[!<]", named):
                reason = f"{show(named)} names a part that model.freeze freezes ({part})"
                yield Finding(("lora", key), reason, f"remove it, or take {part} out of model.freeze")
    yield from _initial(lora, quantization)
    if isinstance(targets, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if lora.get(key) is not None:
                reason = "it cannot be used when target_modules is text"
                yield Finding(
                    ("lora", key), reason, "write target_modules as a list, or put the layers in its pattern"
                )
    elif lora.get("layers_pattern") and lora.get("layers_to_transform") is None:
        yield Finding(
            ("lora", "layers_pattern"),
            "it needs layers_to_transform",
            "add layers_to_transform, or remove it",
        )


def _initial(lora: Section, quantization: Section) -> Iterator[Finding]:
    initial, path = lora.get("init_lora_weights", True), ("lora", "init_lora_weights")
    if isinstance(initial, str):
        if quantization and initial.startswith(NOT_ON_QUANTIZED):
            yield Finding(
                path,
                f"{initial} needs the weights before quantization",
                "use true, gaussian or olora",
            )
        is_stored_as_floats = not quantization or quantization.get("bnb_4bit_quant_storage") in FLOATS
        if initial == "orthogonal" and not is_stored_as_floats:
            reason = "orthogonal takes the type of the stored weights, and quantized ones are integers"
            yield Finding(path, reason, "use true, gaussian or olora")
        if initial in NEEDS_A_PASS:
            yield Finding(
                path,
                f"{initial} needs a pass over the data before training",
                "use true, gaussian, orthogonal or olora",
            )
        if initial.startswith("pissa_niter_") and not quantization:
            yield Finding(
                path,
                f"{initial} draws at random, and anew when the adapter is loaded: another than was trained",
                "use pissa, which is exact",
            )
        if initial == "orthogonal" and _is_number(lora.get("r")) and lora["r"] % 2:
            yield Finding(path, f"orthogonal needs an even rank, and r is {lora['r']}", "use an even r")
        if initial == "loftq" and not lora.get("loftq_config"):
            yield Finding(
                path, "loftq needs loftq_config", "add loftq_config: {loftq_bits: 4, loftq_iter: 1}"
            )
    if lora.get("lora_bias") is True and (lora.get("use_dora") is True or not isinstance(initial, bool)):
        reason = "lora_bias works neither with use_dora nor with another init_lora_weights"
        yield Finding(("lora", "lora_bias"), reason, "remove it, or use plain LoRA")


def _batch(training: Section) -> Iterator[Finding]:
    total = training.get("global_batch_size", 8)
    per_device = training.get("per_device_train_batch_size", "auto")
    if _is_count(total) and _is_count(per_device) and total % per_device:
        reason = f"{per_device} per device does not divide global_batch_size {total}"
        usable = next(size for size in sizes(total) if size <= per_device)
        remedy = f"use {usable}, or another divisor"
        yield Finding(("training", "per_device_train_batch_size"), reason, remedy)
    sorting = next((loss for loss in _texts(training.get("loss_type")) if loss in SORTING), None)
    if per_device == "auto" and sorting is not None:
        reason = f"loss_type {sorting} sorts the pairs of a micro-batch, so its size is part of the loss"
        remedy = "write the number of pairs that shall be sorted together"
        yield Finding(("training", "per_device_train_batch_size"), reason, remedy)


def _preference(training: Section) -> Iterator[Finding]:
    losses, weights = _texts(training.get("loss_type", "sigmoid")), training.get("loss_weights")
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


def _evaluation(job: Section, training: Section) -> Iterator[Finding]:
    datasets = job.get("datasets")
    if not isinstance(datasets, dict) or datasets.get("eval"):
        return
    remedy = "add datasets.eval, or remove it"
    if isinstance(job.get("evaluation"), dict):
        yield Finding(("evaluation",), "there is no datasets.eval to evaluate on", remedy)
    if training.get("eval_strategy") in ("steps", "epoch"):
        yield Finding(("training", "eval_strategy"), "there is no datasets.eval to evaluate on", remedy)
    elif training.get("eval_on_start") is True:
        yield Finding(("training", "eval_on_start"), "there is no datasets.eval to evaluate on", remedy)


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


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _matches(target: str, module: str, *, is_pattern: bool) -> bool:
    """Whether PEFT would adapt `module`: by the end of its name in a list, by a pattern in a text."""
    return module in re.split(r"[.|()]", target) if is_pattern else target.split(".")[-1] == module


def _names(text: str, words: tuple[str, ...]) -> bool:
    """Whether a module's name or a pattern contains one of the words of a part."""
    own = INSIDE_THE_TOWER.sub("merger", text)
    return any(word in own for word in words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and 1 <= value < 2**31
