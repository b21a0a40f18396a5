"""Where the parts of each vision-language architecture lie: the one place that branches on it.

Paths are full module paths in `AutoModelForImageTextToText`; bitsandbytes ignores bare names in
`llm_int8_skip_modules`. The parts are disjoint, and together they are the model.

To add an architecture, add a row here, a tiny model of it to `tests/tiny_models.py`, and run
`tests/test_architectures.py`: it checks the paths against the model that the pinned transformers builds, and
trains the tiny model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from transformers import ProcessorMixin

from runner.errors import DataError
from runner.train.models.paligemma import prefix_and_suffix

FREEZABLE = ("vision_tower", "projector")
"""What an image goes through before the text model."""

PARTS = (*FREEZABLE, "language_model")


@dataclass(frozen=True)
class Parts:
    """A row of the table. A path is that of a module, of a list of modules, or of a lone parameter."""

    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    """Everything between the tower and the text: connectors, mergers, the parameter that ends image rows."""
    language_model: tuple[str, ...]
    lm_head: str = "lm_head"
    """The output embedding, part of the language model; never quantized, because TRL multiplies it raw."""
    fit: Callable[[ProcessorMixin], ProcessorMixin] | None = None
    """Makes of the published processor one that training can use."""
    positions: Literal["rotary", "mrope"] | None = "rotary"
    """How the text model knows where a token stands; None where it attends to parts of a prompt in both
    directions, so that rows with one beginning cannot share it (`runner.train.models.shared`)."""
    features_by_row: bool = False
    """Whether `get_image_features` lists what it made by row of pixel values, not by image."""

    def of(self, names: list[str]) -> list[str]:
        """Paths of the named parts (`vision_tower`, `projector`), in the table's order."""
        parts = {"vision_tower": self.vision_tower, "projector": self.projector}
        return [path for name, paths in parts.items() if name in names for path in paths]

    def part_of(self, path: str) -> str | None:
        """The part that a module or parameter belongs to; None for a module that holds several."""
        for name, prefixes in zip(
            PARTS, (self.vision_tower, self.projector, self.language_model), strict=True
        ):
            if any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes):
                return name
        return None


_IDEFICS = Parts(
    ("model.vision_model",),
    ("model.connector",),
    ("model.text_model", "lm_head"),
    features_by_row=True,
)
_LLAVA = Parts(("model.vision_tower",), ("model.multi_modal_projector",), ("model.language_model", "lm_head"))
_LLAVA_NEWLINE = Parts(
    ("model.vision_tower",),
    ("model.multi_modal_projector", "model.image_newline"),
    ("model.language_model", "lm_head"),
)
# The merger stands inside the tower's module.
_QWEN2 = Parts(
    ("model.visual.patch_embed", "model.visual.rotary_pos_emb", "model.visual.blocks"),
    ("model.visual.merger",),
    ("model.language_model", "lm_head"),
    positions="mrope",
)
_QWEN3 = Parts(
    (*_QWEN2.vision_tower, "model.visual.pos_embed"),
    ("model.visual.merger", "model.visual.deepstack_merger_list"),
    ("model.language_model", "lm_head"),
    positions="mrope",
)

ARCHITECTURES: dict[str, Parts] = {
    "gemma3": replace(_LLAVA, positions=None),
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,  # SmolVLM-Instruct is one
    "internvl": _LLAVA,
    "llava": _LLAVA,  # Pixtral is one, with its own tower and processor
    "llava_next": _LLAVA_NEWLINE,
    "llava_onevision": _LLAVA_NEWLINE,
    "mistral3": _LLAVA,
    "paligemma": replace(_LLAVA, fit=prefix_and_suffix, positions=None),
    "qwen2_5_vl": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "smolvlm": _IDEFICS,  # SmolVLM2
}


def parts(model_type: str) -> Parts:
    """The row of a `config.model_type`.

    Raises:
        DataError: there is none.
    """
    if model_type not in ARCHITECTURES:
        raise DataError(
            f"model: the architecture {model_type!r} is not in the table; known: "
            f"{', '.join(sorted(ARCHITECTURES))}. Remedy: use one of these, or add a row with the paths of "
            "its vision tower, projector and language model to runner/train/models/architectures.py, which "
            "says how"
        )
    return ARCHITECTURES[model_type]
