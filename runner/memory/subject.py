"""A job on a device as its memory terms see it: what is known of it, and what follows at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from runner.facts import DataFacts, ModelFacts, Part
from runner.manifest import Job
from runner.memory.stacks import FLOAT32, Range, exactly
from runner.plan import Geometry, Strategy

Device = Literal["cpu", "cuda"]

BYTES = {"bfloat16": 2, "float16": 2, "float32": FLOAT32}

DEFAULTS: dict[str, Any] = {"optim": "adamw_torch_fused", "gradient_checkpointing": True}
"""Of trl.SFTConfig and DPOConfig 1.16; a test compares them with the generated schema."""


@dataclass(frozen=True)
class Subject:
    """A job with all that is known of it, and what follows at once."""

    model: ModelFacts
    data: DataFacts
    job: Job
    cut: Geometry
    strategy: Strategy
    device: Device

    def option(self, name: str) -> Any:
        """A key of `training`, as the job or upstream's default has it."""
        return self.job.training.options.get(name, DEFAULTS[name])

    @property
    def c(self) -> int:
        """Bytes of a number of the computation."""
        return BYTES[self.job.model.dtype]

    @property
    def pairs(self) -> bool:
        return self.job.method == "dpo"

    @property
    def rows(self) -> int:
        """Answers of a micro-batch: of a pair two."""
        return self.cut.per_device * (2 if self.pairs else 1)

    def saves(self, name: str) -> bool:
        """Whether a saving of the job's `speed` is in force."""
        return self.data.saves(name)

    @property
    def _gathers(self) -> bool:
        """Whether rows of the same images meet in a micro-batch by design."""
        return self.pairs or self.job.datasets.order == "by_image"

    @property
    def image_rows(self) -> Range:
        """How many rows' images a micro-batch holds: of a pair once or twice (TRL's collator)."""
        once = self.saves("encode_once") or self.saves("share_prompt")
        if self.pairs:
            return exactly(self.cut.per_device if once else self.rows)
        return Range(1 if once and self._gathers else self.rows, self.rows)

    @property
    def width(self) -> Range:
        """Tokens of the longest sequence: a row, or all that follow one prompt.

        What they share is at least the images, and at most all but a token of each answer.
        """
        longest = self.data.tokens.largest
        if not (self.saves("share_prompt") and self._gathers):
            return exactly(longest)
        following = 1 if self.pairs else self.cut.per_device - 1
        own = max(1, longest - self.data.image_tokens.p50)
        return Range(longest, longest + following * own)

    @property
    def tokens(self) -> Range:
        """Of a micro-batch: every sequence is padded to the longest."""
        if not (self.saves("share_prompt") and self._gathers):
            return exactly(self.rows * self.data.tokens.largest)
        if self.pairs:
            return self.width * self.cut.per_device
        # Rows that happen to show different images are sequences of their own.
        return Range(self.width.low, self.rows * self.data.tokens.largest)

    @property
    def trains(self) -> int:
        """Parameters that get a gradient: of the base model and of the adapter."""
        return sum(part.trainable + part.adapter for part in self.model.parts.values())

    @property
    def adapter(self) -> int:
        return sum(part.adapter for part in self.model.parts.values())

    def part(self, name: str) -> Part:
        """A part, or an empty one where the model has none of this name."""
        return self.model.parts.get(name) or Part(parameters=0, quantized=0, trainable=0, adapter=0)

    def shard(self, what: Literal["optimizer", "gradients", "weights"]) -> int:
        """Over how many devices a term is split (ZeRO, arXiv 1910.02054, section 5; FSDP2 as stage 3)."""
        first = {"optimizer": ("zero1", "zero2", "zero3", "fsdp2"), "gradients": ("zero2", "zero3", "fsdp2")}
        return self.cut.world if self.strategy in first.get(what, ("zero3", "fsdp2")) else 1
