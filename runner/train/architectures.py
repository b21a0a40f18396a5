"""Where the parts of each vision-language architecture lie: the one place that branches on it.

Prefixes are full module paths in `AutoModelForImageTextToText`; bitsandbytes ignores bare names in
`llm_int8_skip_modules`. To add an architecture, add a row: `tests/test_model.py` checks every row against
the model that the pinned transformers builds from the type's default configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import DataError


@dataclass(frozen=True)
class Parts:
    """Module paths of the two parts that a job can freeze, disjoint, and of the output embedding."""

    vision_tower: str
    projector: str
    lm_head: str = "lm_head"

    def of(self, names: list[str]) -> list[str]:
        """Module paths of the named parts (`vision_tower`, `projector`), in that order."""
        paths = {"vision_tower": self.vision_tower, "projector": self.projector}
        return [paths[name] for name in paths if name in names]


_IDEFICS = Parts("model.vision_model", "model.connector")
_LLAVA = Parts("model.vision_tower", "model.multi_modal_projector")

ARCHITECTURES: dict[str, Parts] = {
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,  # SmolVLM-Instruct is one
    "smolvlm": _IDEFICS,  # SmolVLM2
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "gemma3": _LLAVA,
    "internvl": _LLAVA,
    "mistral3": _LLAVA,
}


def parts(model_type: str) -> Parts:
    """The parts of a `config.model_type`.

    Raises:
        DataError: no row for this type.
    """
    if model_type not in ARCHITECTURES:
        raise DataError(
            f"model: the architecture {model_type!r} is not in the table; known: "
            f"{', '.join(sorted(ARCHITECTURES))}. Remedy: use one of these, or add a row with the module "
            "paths of its vision tower and projector to runner/train/architectures.py"
        )
    return ARCHITECTURES[model_type]
