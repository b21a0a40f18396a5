"""What a plan needs to know of a model and of the data, as data: found by `runner.train.inspect`, which may
import torch; read by `runner.memory` and `runner.planning`, which may not.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from runner.findings import Finding
from runner.manifest import Job
from runner.plan import Fetched

QUICK = 1000
"""Rows that a plan looks at where nobody says how many: seconds on one core, for images of a megapixel."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stack(_Facts):
    """A stack of transformer layers: the text model, or a vision tower."""

    layers: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside the MLP."""
    heads: int
    kv_heads: int
    head_dim: int


class Part(_Facts):
    """A part of the architecture table: vision_tower, projector, language_model with embeddings, lm_head."""

    parameters: int
    """All of them, without adapters; tied weights count once, where they are first."""
    quantized: int
    """Those of them that the job's quantization packs."""
    trainable: int
    """Of the base model; 0 under LoRA."""
    adapter: int
    """Parameters that the job's LoRA adds here."""


class ModelFacts(_Facts):
    """A model as the job adapts it, from the meta device: exact, no weights were read."""

    model_type: str
    model_class: str
    parts: dict[str, Part]
    text: Stack
    vision: Stack | None
    """None where the configuration does not say."""
    vocabulary: int
    """Rows of the head."""
    tied_head: bool
    adapted_inputs: int
    """Sum of the input widths of all modules that LoRA adapts: what they keep of a token for backward."""
    buffers: int
    """Bytes of buffers."""


class Percentiles(_Facts):
    """Of one number over the rows."""

    p50: int
    p95: int
    largest: int
    mean: float


class DataFacts(_Facts):
    """The prepared training rows, by the processor itself."""

    rows: int
    looked_at: int
    """Rows that were really counted; fewer than `rows` on a sample."""
    skipped: int
    tokens: Percentiles
    """A row, image tokens and answers included; of pairs, the longer answer with the prompt."""
    image_tokens: Percentiles
    """Those of them that its images take, with what a processor puts around images and their tiles."""
    images: Percentiles
    pixel_values: int
    """Numbers in the pixel values of the row that has most; of a pair, its images once."""
    tower_tokens: int
    """Positions that the vision tower sees for that row, all its images and tiles."""
    savings: dict[str, str | None] = {}
    """Of the job's `speed`, by key: null where it is in force, else why not; empty in records from before."""

    def saves(self, name: str) -> bool:
        """Whether a saving is in force."""
        return self.savings.get(name, "") is None


class Question(_Facts):
    """What is asked of `runner.train.inspect`."""

    job: Job
    fetched: Fetched
    sample: int | None
    """Rows to look at, drawn by the job's seed; None: all, or `QUICK` of them where there are more."""


class Answer(_Facts):
    """What `runner.train.inspect` found."""

    model: ModelFacts | None
    """None where a check failed that goes before it; so is `data`."""
    weight_bytes: int
    """Of the base model in memory: packed weights with their scales, and buffers. 0 without `model`."""
    data: DataFacts | None
    eval_rows: int | None
    """Rows that are evaluated on, before bad ones are skipped; None where they cannot be opened."""
    findings: list[Finding]
    notes: list[str]
    """What a trainer would say of the rows: skipped, changed, without images."""
