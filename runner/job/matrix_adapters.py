"""The rows of the compatibility matrix about what is quantized and adapted (`runner.job.matrix`). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from runner.job.cells import Section, is_number, texts
from runner.job.shape import Finding, show

TOWER_WORDS = ("vision_tower", "vision_model", "visual", "image_encoder", "vision_encoder")
PROJECTOR_WORDS = ("projector", "connector", "modality_projection", "merger", "aligner")
"""How models call the parts that `model.freeze` names."""
INSIDE_THE_TOWER = re.compile(r"\bvisual[.\\]+(deepstack_)?merger")
"""Qwen's projectors, which stand in the module of its tower."""

NOT_ON_QUANTIZED = ("pissa", "mica", "loftq")
FLOATS = ("bfloat16", "float16", "float32", "float64")
NEEDS_A_PASS = ("eva", "corda", "lora_ga")


def quantized(quantization: Section, *, has_lora: bool) -> Iterator[Finding]:
    """Rows of the section quantization."""
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


def adapted(lora: Section, quantization: Section, *, freeze: list[str]) -> Iterator[Finding]:
    """Rows of the section lora; `freeze` as under model."""
    targets = lora.get("target_modules")
    if any(_matches(target, "lm_head", is_pattern=isinstance(targets, str)) for target in texts(targets)):
        reason = "an adapter on lm_head would never train: TRL multiplies its weight directly"
        yield Finding(
            ("lora", "target_modules"),
            reason,
            "leave lm_head out",
        )
    for key in ("target_modules", "modules_to_save"):
        for part, words in (("vision_tower", TOWER_WORDS), ("projector", PROJECTOR_WORDS)):
            named = next((text for text in texts(lora.get(key)) if _names(text, words)), None)
            if named is not None and part in freeze and not re.search(r"\(\?[!<]", named):
                reason = f"{show(named)} names a part that model.freeze freezes ({part})"
                yield Finding(("lora", key), reason, f"remove it, or take {part} out of model.freeze")
    yield from _initial(lora, quantization)
    if lora.get("velora_config") is not None:
        reason = "VeLoRA projects by values outside the parameters, so that a resumed run would differ"
        yield Finding(("lora", "velora_config"), reason, "remove it")
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
                "use true, gaussian or olora",
            )
        if initial.startswith("pissa_niter_") and not quantization:
            yield Finding(
                path,
                f"{initial} draws at random, and anew when the adapter is loaded: another than was trained",
                "use pissa, which is exact",
            )
        if initial == "orthogonal" and is_number(lora.get("r")) and lora["r"] % 2:
            yield Finding(path, f"orthogonal needs an even rank, and r is {lora['r']}", "use an even r")
        if initial == "loftq" and not lora.get("loftq_config"):
            yield Finding(
                path, "loftq needs loftq_config", "add loftq_config: {loftq_bits: 4, loftq_iter: 1}"
            )
    if lora.get("lora_bias") is True and (lora.get("use_dora") is True or not isinstance(initial, bool)):
        reason = "lora_bias works neither with use_dora nor with another init_lora_weights"
        yield Finding(("lora", "lora_bias"), reason, "remove it, or use plain LoRA")


def _matches(target: str, module: str, *, is_pattern: bool) -> bool:
    """Whether PEFT would adapt `module`: by the end of its name in a list, by a pattern in a text."""
    return module in re.split(r"[.|()]", target) if is_pattern else target.split(".")[-1] == module


def _names(text: str, words: tuple[str, ...]) -> bool:
    """Whether a module's name or a pattern contains one of the words of a part."""
    own = INSIDE_THE_TOWER.sub("merger", text)
    return any(word in own for word in words)
