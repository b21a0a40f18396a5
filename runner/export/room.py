"""Whether there is room for an export, before anything is computed for it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.durable import disk
from runner.errors import DataError, StorageError
from runner.planning.words import size

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package."""

_SMALL = 1 << 20
"""Bytes of card, job and configurations."""


def check_room(to: Path, needed: int) -> None:
    """
    Args:
        to: the folder that will be; the one above it is there.
        needed: bytes.

    Raises:
        StorageError: they do not fit.
    """
    with disk("look for room", to.parent):
        free = shutil.disk_usage(to.parent).free
    if free < needed:
        raise StorageError(
            f"export to {to}: it needs {size(needed)}, and {to.parent} has {size(free)} free; nothing was "
            "written; remedy: free space there, or name a folder on another disk with --to"
        )


def of_folders(*folders: Path) -> int:
    """Bytes of a copy of what is in folders."""
    files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
    return _SMALL + sum(file.stat().st_size for file in files)


def of_processor(base: Path) -> int:
    """Bytes of the files of a model's folder that are no weights."""
    kept = (".json", ".txt", ".model", ".jinja")
    return sum(file.stat().st_size for file in base.iterdir() if file.suffix in kept and file.is_file())


def of_weights(base: Path, dtype: str) -> int:
    """Bytes of a model's weights when their floats have another dtype.

    Raises:
        DataError: a file is no safetensors.
    """
    total = 0
    for file in sorted(base.glob("*.safetensors")):
        for tensor in _tensors(file):
            begin, end = tensor["data_offsets"]
            floats = str(tensor["dtype"]) in ("F32", "F16", "BF16", "F64")
            total += math.prod(tensor["shape"]) * BYTES[dtype] if floats else end - begin
    return total


def _tensors(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with disk("read the base model", file), file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length) if length <= _LONGEST_HEADER else b"")
        yield from (value for name, value in header.items() if name != "__metadata__")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"export: {file} of the base model is no safetensors file: {error}; remedy: get the model again"
        ) from error
