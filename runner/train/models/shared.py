"""A model that does the work that rows have in common once; its outputs are those of the rows one by one.

    sharing of the batch        what runs
    none                        the model as it is
    image sets                  the tower once per set, the text model once per row
    sequences, scored           the tower once per set, the text model once per sequence (`packing`)

`scored` is a call for log-probabilities (TRL's fused head, `fused_lm_head=True`), as training makes it. They
come back where TRL looks for them, row by row, so its losses are untouched.

Hooks, all on the instance: the forward of the model, and `get_image_features` of the model inside, through
which every architecture of the table encodes images; so it works inside whatever DeepSpeed, FSDP2 and
checkpointing do around a forward. `tests/test_shared.py` compares every architecture with its plain way.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from runner.train.data.sharing import Sharing
from runner.train.models.architectures import Parts, parts
from runner.train.models.packing import Packed, pack

SCORES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Per-token fields of TRL's FusedCausalLMOutput (trl 1.16)."""

MASKS = ("sdpa", "eager")
"""Attention implementations that take a mask of who sees whom."""


def packs(config: Any, attn_implementation: str, longest: int) -> str | None:
    """Why rows of a model cannot run as one sequence; None: they can.

    Args:
        config: the whole model's.
        longest: tokens of the longest row.
    """
    if parts(config.model_type).positions is None:
        return f"{config.model_type} attends to parts of its prompt in both directions"
    if attn_implementation not in MASKS:
        return f"attn_implementation {attn_implementation} takes no mask of who sees whom; {MASKS[0]} does"
    window = _window(config)
    if window is not None and longest > window:
        return f"its text model attends to {window} tokens, and the longest row has {longest}"
    return None


def _window(config: Any) -> int | None:
    """Tokens that the text model attends to; None: all."""
    window: int | None = getattr(config.get_text_config(), "sliding_window", None)
    return window


@dataclass
class _Kept:
    """What the tower made of the images of one batch."""

    features: ModelOutput | None = None


class SharedImages:
    """The two hooks of one model; see the module."""

    def __init__(self, model: torch.nn.Module, *, frozen: bool) -> None:
        """
        Args:
            frozen: whether tower and projector never change, so that what they make of an image holds for
                the policy and the reference alike.
        """
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, PreTrainedModel)
        self._base = base
        self._where: Parts = parts(base.config.model_type)
        self._frozen = frozen
        self._window = _window(base.config)
        self._kept: _Kept | None = None
        self._shown: tuple[Sequence[int], Sharing] | None = None
        self._forward = base.forward
        self._encode = base.model.get_image_features

        # `generate` looks at both signatures.
        @functools.wraps(type(base).forward)
        def forward(_self: PreTrainedModel, *args: Any, sharing: Sharing | None = None, **inputs: Any) -> Any:
            return self._forward(*args, **inputs) if sharing is None else self._run(sharing, inputs)

        @functools.wraps(self._encode)
        def get_image_features(*args: Any, **kwargs: Any) -> ModelOutput:
            return self._features(*args, **kwargs)

        base.forward = types.MethodType(forward, base)
        base.model.get_image_features = get_image_features

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, all forwards are of one batch: a frozen tower encodes its images in the first one."""
        self._kept = _Kept() if self._frozen else None
        try:
            yield
        finally:
            self._kept = None

    @torch.compiler.disable(recursive=False)  # a layout of its own every time; what it calls is compiled
    def _run(self, sharing: Sharing, inputs: dict[str, Any]) -> Any:
        inputs = {**inputs, **self._positions(sharing, inputs)}
        ids = inputs["input_ids"]
        # Rows of an evaluation may be longer than those that `packs` was asked about.
        outgrown = self._window is not None and ids.shape[1] > self._window
        if outgrown or not (sharing.packs and inputs.get("fused_lm_head")):
            with self._showing(sharing.shows, sharing):
                return self._forward(**inputs)
        packed = pack(sharing, ids.shape[1], ids.device)
        labels = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
        scored = labels != -100
        for name in ("input_ids", "mm_token_type_ids", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = packed.gather(inputs[name])
        inputs.setdefault("position_ids", packed.source % ids.shape[1])
        inputs["attention_mask"] = self._mask(packed)
        told = packed.gather(labels)
        inputs["shift_labels"] = told.masked_fill(~packed.real | (packed.branch == 0), -100)
        with self._showing([sharing.shows[one.rows[0]] for one in sharing.sequences], sharing):
            outputs = self._forward(**inputs)
        for name in SCORES:
            if outputs.get(name) is not None:
                values = packed.scatter(outputs[name])
                outputs[name] = values.masked_fill(~scored, 0)[:, :-1]
        outputs["label_mask"] = scored[:, :-1]
        return outputs

    def _positions(self, sharing: Sharing, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """M-RoPE's positions of every row, int64 (3, R, T): the model reads them off the sizes of the images
        of every row, which here stand once."""
        if self._where.positions != "mrope" or inputs.get("image_grid_thw") is None:
            return {}
        sizes = inputs["image_grid_thw"].split(list(sharing.counts))
        positions, _ = self._base.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=torch.cat([sizes[number] for number in sharing.shows]),
            attention_mask=inputs["attention_mask"],
        )
        return {"position_ids": positions}

    def _mask(self, packed: Packed) -> torch.Tensor:
        visible = packed.visible()
        if self._base.config._attn_implementation == "sdpa":
            return visible
        least = torch.finfo(self._base.dtype).min
        return torch.zeros(visible.shape, dtype=self._base.dtype, device=visible.device).masked_fill(
            ~visible, least
        )

    # --- images ---

    @contextlib.contextmanager
    def _showing(self, order: Sequence[int], sharing: Sharing) -> Iterator[None]:
        self._shown = (order, sharing)
        try:
            yield
        finally:
            self._shown = None

    @torch.compiler.disable(recursive=False)
    def _features(self, *args: Any, **kwargs: Any) -> ModelOutput:
        if self._kept is None:
            made = self._encode(*args, **kwargs)
        else:
            made = self._kept.features or self._encode(*args, **kwargs)
            self._kept.features = made
        if self._shown is None:
            return made
        order, sharing = self._shown
        return (
            made if list(order) == list(range(len(sharing.counts))) else self._repeated(made, order, sharing)
        )

    def _repeated(self, made: ModelOutput, order: Sequence[int], sharing: Sharing) -> ModelOutput:
        """What the tower made of every image set, in the order in which sequences show them."""
        features = made.pooler_output
        parts = [1] * len(sharing.counts) if self._where.features_by_row else list(sharing.counts)
        if len(features) != sum(parts):
            # A tile has a feature of its own. Pairs show all sets and then all again: nothing is to be cut.
            parts, order = [len(features)], [0] * (len(order) // len(sharing.counts))
        ends = torch.tensor([0, *parts]).cumsum(0).tolist()
        chosen = [number for one in order for number in range(ends[one], ends[one + 1])]

        def again(values: Any) -> Any:
            return values[chosen] if isinstance(values, torch.Tensor) else [values[one] for one in chosen]

        repeated = type(made)(**made)
        repeated["pooler_output"] = again(features)
        if made.get("deepstack_features") is not None:  # Qwen3-VL's, of every layer that adds some
            repeated["deepstack_features"] = [again(layer) for layer in made.deepstack_features]
        return repeated
