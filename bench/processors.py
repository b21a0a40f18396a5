"""The processor of plain TRL and of the speed bench: with Pillow's images, as the runner's jobs have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin


def load_processor(folder: Path, options: dict[str, Any]) -> ProcessorMixin:
    """Of a model's folder.

    Args:
        options: keyword arguments of AutoProcessor.
    """
    processor = AutoProcessor.from_pretrained(folder, **options)
    # Given to AutoProcessor, `backend` reaches the tokenizer and the videos, too.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    return processor
