"""The terms of a job on a device, and their sum: an interval, because nobody knows it to the byte.

`low` is what PyTorch cannot do without, `high` what it may need on top. Where `high` fits, the job does;
where `low` does not, neither does the job; between the two nobody can say before it is tried, which
`per_device_train_batch_size: auto` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runner.memory import terms
from runner.memory.devices import MIB
from runner.memory.stacks import NOTHING, Range
from runner.memory.subject import Device, Subject
from runner.plan import Geometry, Strategy

Verdict = Literal["fits", "may fit", "does not fit"]

CONTEXT = Range(300 * MIB, 700 * MIB)
"""A CUDA context with the kernels of PyTorch and bitsandbytes: what nvidia-smi shows of a process beyond what
PyTorch reserved, by GPU and version (pytorch.org/docs/stable/notes/cuda.html, memory management)."""
COLLECTIVES = Range(100 * MIB, 600 * MIB)
"""Buffers of NCCL, where there are several processes."""
CACHED = Range(0.02, 0.15)
"""Share of the tensors that PyTorch's allocator reserves beyond them: 6.05 GiB allocated to 6.27 reserved,
16.34 to 18.69, in the published notebooks of tests/data/memory-published.jsonl."""

PROCESS = Range(620 * MIB, 720 * MIB)
"""A trainer without a model: Python, the libraries, their threads and kernels (measured, CPU build)."""
HEAP = Range(0.05, 0.6)
"""Share of activations and batches that the C library keeps after they were freed (measured, glibc)."""

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Values of model.attn_implementation whose memory is known; all but eager keep no scores."""

UNKNOWN_OPTIONS = {
    "torch_compile": "a compiled model keeps other activations",
    "use_liger_kernel": "Liger's kernels keep other activations",
    "activation_offloading": "activations go to the host",
}
"""Keys of `training` that change the activations in a way that is not modelled, and why."""


@dataclass(frozen=True)
class Term:
    """Bytes of one kind on one device."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device at the peak of training."""

    device: Device
    strategy: Strategy
    cut: Geometry
    terms: tuple[Term, ...]
    unknown: tuple[str, ...]
    """What is not in the terms because it is not known, each with its reason; then nothing surely fits."""

    @property
    def low(self) -> int:
        return sum(term.low for term in self.terms)

    @property
    def high(self) -> int:
        return sum(term.high for term in self.terms)

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    def verdict(self, capacity: int) -> Verdict:
        """Whether it fits into `capacity` bytes.

        low          high         unknown    verdict
        within       within       nothing    fits
        within       within       something  may fit
        within       above        any        may fit
        above        above        any        does not fit
        """
        if self.low > capacity:
            return "does not fit"
        return "fits" if self.high <= capacity and not self.unknown else "may fit"


def estimate(it: Subject) -> Estimate:
    """Bytes on one device at the peak of training, for the worst micro-batch that the data can make."""
    job, options = it.job, it.job.training.options
    unknown = [f"training.{name}: {why}" for name, why in UNKNOWN_OPTIONS.items() if options.get(name)]
    if (job.lora or {}).get("use_dora"):
        unknown.append("lora.use_dora: the norm of every adapted weight is computed in every step")
    if job.model.attn_implementation not in ATTENTION:
        unknown.append(f"model.attn_implementation: {job.model.attn_implementation} may keep scores")
    if job.model.attn_implementation == "eager" and it.data.tower_tokens:
        unknown.append("model.attn_implementation: eager keeps the tower's scores, by the size of its tiles")
    states = terms.optimizer(it)
    if states is None:
        unknown.append(f"training.optim: the states of {it.option('optim')} are not known")
    text = terms.text(it)
    tower = terms.tower(it, text)
    if tower is None:
        unknown.append("model: its configuration does not say how wide the vision tower is")
    ranges = {
        "weights": terms.weights(it),
        "adapter": terms.adapter(it),
        "autocast copies": terms.casts(it),
        "gradients": terms.gradients(it),
        "optimizer": states or NOTHING,
        "activations, text": text,
        "activations, tower": tower or NOTHING,
        "head": terms.head(it),
        "batch": terms.batch(it),
    }
    ranges["reserve"] = _reserve(it, ranges)
    found = tuple(Term(name, int(one.low), int(one.high)) for name, one in ranges.items())
    return Estimate(it.device, it.strategy, it.cut, found, tuple(unknown))


def _reserve(it: Subject, ranges: dict[str, Range]) -> Range:
    """What the process and its allocator take beyond the tensors."""
    if it.device == "cuda":
        every = Range(sum(one.low for one in ranges.values()), sum(one.high for one in ranges.values()))
        kept = Range(every.low * CACHED.low, every.high * CACHED.high)
        return CONTEXT + kept + (COLLECTIVES if it.cut.world > 1 else NOTHING)
    moving = [ranges[name] for name in ("activations, text", "activations, tower", "head", "batch")]
    low, high = (sum(getattr(one, end) for one in moving) for end in ("low", "high"))
    return PROCESS + Range(low * HEAP.low, high * HEAP.high) + terms.fragments(it)
