"""What a plan wants to know of prepared rows: tokens, images, and what the largest asks of a tower."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runner.facts import DataFacts, Percentiles
from runner.train import probe
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows


def measure(
    rows: Rows, collator: Collator, vision: Any, total: int, savings: dict[str, str | None]
) -> DataFacts:
    """The facts of rows that may be a sample.

    Args:
        collator: of the training rows.
        vision: the model's `vision_config`.
        total: rows that the job trains on.
        savings: what of the job's `speed` is in force.
    """
    tokens, texts, images = (rows.dataset[name][:] for name in ("tokens", "text_tokens", "image_count"))
    # Each image was one placeholder of the text.
    added = [whole - text + count for whole, text, count in zip(tokens, texts, images, strict=True)]
    largest = collator([probe.worst(rows, collator).largest])
    # A pair's images stand there twice, where they are not shared.
    copies = 2 if rows.form == "preference" and "sharing" not in largest else 1
    return DataFacts(
        rows=total,
        looked_at=len(tokens) + len(rows.skipped),
        skipped=len(rows.skipped),
        tokens=percentiles(tokens),
        image_tokens=percentiles(added),
        images=percentiles(images),
        pixel_values=probe.pixels(largest) // copies,
        tower_tokens=tower_tokens(largest, vision) // copies,
        savings=savings,
    )


def percentiles(numbers: Sequence[int]) -> Percentiles:
    """By nearest rank."""
    ordered = sorted(numbers)

    def at(share: float) -> int:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    mean = round(sum(ordered) / len(ordered), 3)
    return Percentiles(p50=at(0.5), p95=at(0.95), largest=ordered[-1], mean=mean)


def tower_tokens(batch: Mapping[str, Any], vision: Any) -> int:
    """Patches that the vision tower sees of a batch, padding tiles included.

    image_grid_thw           (images, 3): the product of each row is its patches (Qwen-VL)
    pixel_values             (..., H, W): every tile in squares of the configuration's patch_size
    no pixel_values          0
    """
    if "image_grid_thw" in batch:
        return int(batch["image_grid_thw"].prod(dim=-1).sum())
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, torch.Tensor):
        return 0
    patch = vision.patch_size
    high, wide = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    *outer, channels, height, width = pixels.shape
    del channels
    return math.prod(outer) * (height // high) * (width // wide)
