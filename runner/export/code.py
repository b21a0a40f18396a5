"""How plain transformers and PEFT load an export, as lines of Python. Pure.

The model card prints them, the load check and the tests execute them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.demo import PREFIX
from runner.export.order import Kind


@dataclass(frozen=True)
class Base:
    """The base model of an adapter, as `from_pretrained` finds it."""

    place: str
    """Hub id or folder; or `demo:<name>`, which this package has the folder of."""
    revision: str | None = None
    """Commit of a hub id."""


def load_lines(
    kind: Kind, place: str, dtype: str, base: Base | None, quantization: Mapping[str, Any] | None
) -> list[str]:
    """Lines after which `model` and `processor` are there; six at most.

    Args:
        place: hub id or folder of the export.
        base: of an adapter.
        quantization: arguments of BitsAndBytesConfig that an adapter was trained over, or None.
    """
    names = ["AutoModelForImageTextToText", "AutoProcessor"]
    lines: list[str] = []
    if base is None:
        model = _call("AutoModelForImageTextToText.from_pretrained", place, dtype=dtype)
        lines = [_import(names), f"model = {model}"]
    else:
        more: dict[str, Any] = {} if base.revision is None else {"revision": base.revision}
        loaded = _call("AutoModelForImageTextToText.from_pretrained", base.place, **more, dtype=dtype)
        if base.place.startswith(PREFIX):
            lines.append("from runner.demo import resolve_model")
            loaded = loaded.replace(_literal(base.place), f"resolve_model({_literal(base.place)})", 1)
        if quantization is not None:
            names.append("BitsAndBytesConfig")
            given = _call("BitsAndBytesConfig", **quantization)
            if not lines:
                lines, given = [f"quantization = {given}"], "quantization"
            loaded = f"{loaded.removesuffix(')')}, quantization_config={given})"
        lines = ["from peft import PeftModel", _import(names), *lines, f"base = {loaded}"]
        lines.append(f"model = PeftModel.from_pretrained(base, {_literal(place)})")
    return [*lines, f"processor = {_call('AutoProcessor.from_pretrained', place)}"]


def ask_lines() -> list[str]:
    """Lines that ask the loaded model about an image."""
    return [
        "from PIL import Image",
        'image = Image.open("image.png").convert("RGB")',
        'content = [{"type": "image"}, {"type": "text", "text": "What does the image show?"}]',
        'prompt = processor.apply_chat_template([{"role": "user", "content": content}], '
        "add_generation_prompt=True)",
        'inputs = processor(text=prompt, images=[image], return_tensors="pt").to(model.device, model.dtype)',
        "output = model.generate(**inputs, do_sample=False, max_new_tokens=32)",
        'print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _import(names: list[str]) -> str:
    return f"from transformers import {', '.join(names)}"


def _call(name: str, *places: str, **values: Any) -> str:
    given = [*map(_literal, places), *(f"{key}={_literal(value)}" for key, value in values.items())]
    return f"{name}({', '.join(given)})"


def _literal(value: Any) -> str:
    """As Python writes it, with the double quotes that people write."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)
