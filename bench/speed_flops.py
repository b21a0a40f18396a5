"""Model FLOPs of a training sample, and the most that a device can do: the two sides of MFU.

MFU (model FLOPs utilization; Chowdhery et al., PaLM, arXiv 2204.02311, appendix B) = model FLOPs of a sample
x samples per second / peak FLOPs per second. Counted is the work that the loss needs, the same for all rows
of a case, however often one of them does it: recomputation is no model work, nor is what is done twice.

    linear layer            2 FLOPs for each weight and token, forward
    attention               4 x width x context for each token and layer, forward: QK^T and its product with
                            V, not halved for the causal mask, as in PaLM
    backward                for the inputs as much as forward; of attention twice as much. For weights
                            nothing: they are frozen, and the adapter's, a hundredth of them, are left out
    tower and projector     frozen: forward, once for each image of a micro-batch
    text                    forward and backward; what rows of a micro-batch begin with is counted once: the
                            prompt of a pair, what the questions about one image share
    head                    2 FLOPs for each weight and scored token, forward, and as much backward
    reference of dpo        another forward of the text and the head, in the first epoch only

The embedding is a look-up, norms and activations are left out, as in PaLM.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

PUBLISHED = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}
"""Dense bfloat16 FLOPs per second of a card, by the name that it gives itself: NVIDIA's data sheets."""


@dataclass(frozen=True)
class Sample:
    """What one row is made of."""

    images: int
    """Pictures that the tower sees each for itself: tiles, or 1."""
    patches: int
    """Of one of them."""
    image_tokens: int
    """Of the text model, for all of them."""
    prompt: float
    """Tokens that `answers` begin with, image tokens included; under `shared_by`, those of all its rows."""
    answers: tuple[float, ...]
    """Tokens of each sequence beyond `prompt`."""
    scored: float
    """Tokens that carry loss."""
    shared_by: int
    """Rows of a micro-batch that have the images and the prompt in common."""


@dataclass(frozen=True)
class Weights:
    """Parameters of linear layers, widths and depths of a model."""

    tower: int
    tower_width: int
    tower_layers: int
    projector: int
    """FLOPs / 2 for one image token."""
    text: int
    text_width: int
    """Of attention: heads x head_dim."""
    text_layers: int
    head: int


def weights(config: dict[str, Any]) -> Weights:
    """Of a configuration of Idefics3 or Qwen2-VL."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    head_dim = text.get("head_dim") or hidden // text["num_attention_heads"]
    queries, keys = (text[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    of_layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * text["intermediate_size"]
    if config["model_type"] == "idefics3":
        width, depth, inner = (
            vision[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")
        )
        patch = 3 * vision["patch_size"] ** 2
        projector = width * config["scale_factor"] ** 2 * hidden
    else:
        width, depth = vision["embed_dim"], vision["depth"]
        inner = width * vision["mlp_ratio"]
        patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        merged = width * vision["spatial_merge_size"] ** 2
        projector = merged * merged + merged * hidden
    return Weights(
        tower=depth * (4 * width**2 + 2 * width * inner) + patch * width,
        tower_width=width,
        tower_layers=depth,
        projector=projector,
        text=layers * of_layer,
        text_width=queries,
        text_layers=layers,
        head=hidden * text["vocab_size"],
    )


def flops(model: Weights, row: Sample, method: str, reference: bool) -> float:
    """Model FLOPs of one row; see the module's first lines.

    Args:
        reference: whether dpo's reference is computed, or known from an earlier epoch.
    """
    per_patch = 2 * model.tower + 4 * model.tower_width * model.tower_layers * row.patches
    seen = row.images * row.patches * per_patch + 2 * model.projector * row.image_tokens
    tokens = row.prompt / row.shared_by + sum(row.answers)
    # Each token of the prompt has the prompt as its context, each of an answer both.
    pairs = row.prompt**2 / row.shared_by + sum(one * (row.prompt + one) for one in row.answers)
    linear = 2 * (model.text * tokens + model.head * row.scored)
    attention = 4 * model.text_width * model.text_layers * pairs
    trained = 2 * linear + 3 * attention
    return seen / row.shared_by + trained + (linear + attention if method == "dpo" and reference else 0)


def peak(card: str | None) -> dict[str, Any] | None:
    """The most FLOPs per second, and where that is from; None for a card that the table does not have.

    Without a card: the best of ten products of float32 matrices of 2,048 x 2,048, on all cores.
    """
    if card is not None:
        found = PUBLISHED.get(card)
        return None if found is None else {"flops": found, "source": "published, dense bfloat16"}
    import torch

    size = 2048
    left, right = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return {"flops": 2 * size**3 / best, "source": f"measured, float32 matrices of {size} x {size}"}
