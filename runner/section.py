"""What every section of a job is made of: a strict model, and the words and quantities that several use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

DURATION_PATTERN = r"^[0-9]+(\.[0-9]+)?(s|m|h)$"
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}

QUANTITY_PATTERN = r"^[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)$"
"""Bytes as Kubernetes writes them. With a unit always: a bare 64 would be 64 bytes."""
BYTES = {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
}

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1)]
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN)]
Duration = Annotated[str, Field(pattern=DURATION_PATTERN)]


class Section(BaseModel):
    """Strict (no "8" for 8), closed (no unknown key) and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def seconds(duration: str) -> float:
    """90s, 2m, 1h in seconds."""
    return float(duration[:-1]) * SECONDS[duration[-1]]


def size(quantity: str) -> int:
    """64Gi, 500M in bytes."""
    number = quantity.rstrip("KMGTik")
    return int(float(number) * BYTES[quantity[len(number) :]])
