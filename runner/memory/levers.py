"""What would make a job fit a device, and which strategy is simple enough. Everything is estimated again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runner.facts import DataFacts, ModelFacts
from runner.manifest import Job
from runner.memory.estimate import Estimate, Verdict, estimate
from runner.memory.terms import DEFAULTS, Device
from runner.plan import Geometry, Strategy, geometry, recut, sizes

FIXED_IMAGES = ("gemma3", "llava", "paligemma")
"""Architectures whose images take the same tokens whatever their size."""

SHARDED: tuple[Strategy, ...] = ("zero2", "zero3", "fsdp2")
MORE_DEVICES = (2, 4, 8, 16)
"""Times as many devices that are tried."""


@dataclass(frozen=True)
class Lever:
    """One change to a job, and what it makes of its memory."""

    name: str
    keys: dict[str, Any]
    """Dotted keys of the job with their new values; None where the value depends on the processor."""
    estimate: Estimate
    saves: int
    """Bytes less at the high end."""
    verdict: Verdict


@dataclass(frozen=True)
class Choice:
    """The strategy that `launch.strategy: auto` takes."""

    strategy: Strategy
    reason: str
    estimate: Estimate


def choose(
    model: ModelFacts,
    data: DataFacts,
    job: Job,
    cut: Geometry,
    device: Device,
    capacity: int | None,
    possible: Sequence[Strategy] = ("zero2", "zero3"),
) -> Choice:
    """The simplest strategy whose high end fits: what is not needed costs time on the wire.

        world   ddp fits   zero2 fits   zero3 fits   strategy
            1   -          -            -            single
          > 1   yes        -            -            ddp
          > 1   no         yes          -            zero2
          > 1   no         no           yes          zero3
          > 1   no         no           no           zero3, and the reason says so
        > 1   nobody knows the capacity            ddp, and the reason says so

    Args:
        capacity: bytes of one device (`Gpu.usable`); None where its type is not known.
        possible: what the job can train under besides ddp, the simplest first.
    """
    if cut.world == 1:
        return Choice("single", "one process", estimate(model, data, job, cut, "single", device))
    if capacity is None:
        found = estimate(model, data, job, cut, "ddp", device)
        reason = f"the simplest; what a device has is not known, and it may need {_gib(found.high)}"
        return Choice("ddp", reason, found)
    tried: list[str] = []
    some_without = data.images.largest > 0 and data.images.mean < 1
    # Weights in parts want an image in every row or in none.
    order = ("ddp", *(one for one in possible if one != "zero3" or not some_without))
    if job.training.per_device_train_batch_size == "auto":
        cut = recut(cut, 1)  # what fits with one row at once; how many more do is found later
    for strategy in order:
        found = estimate(model, data, job, cut, strategy, device)
        if found.high <= capacity:
            above = f"; {' and '.join(tried)} may need more than the device has" if tried else ""
            return Choice(strategy, f"needs at most {_gib(found.high)} of {_gib(capacity)}{above}", found)
        tried.append(f"{strategy} ({_gib(found.high)})")
    reason = f"needs least; nothing surely fits {_gib(capacity)}: {', '.join(tried)}"
    return Choice(order[-1], reason, found)


def levers(
    model: ModelFacts,
    data: DataFacts,
    job: Job,
    cut: Geometry,
    strategy: Strategy,
    device: Device,
    capacity: int,
) -> list[Lever]:
    """The single changes that save memory, the largest saving first.

    Args:
        capacity: bytes of one device (`Gpu.usable`).
    """
    now = estimate(model, data, job, cut, strategy, device).high
    found = []
    for name, keys, changed in _changes(model, data, job, cut, strategy, device, capacity):
        if changed.high < now:
            found.append(Lever(name, keys, changed, now - changed.high, changed.verdict(capacity)))
    return sorted(found, key=lambda lever: -lever.saves)


_Change = tuple[str, dict[str, Any], Estimate]


def _changes(
    model: ModelFacts,
    data: DataFacts,
    job: Job,
    cut: Geometry,
    strategy: Strategy,
    device: Device,
    capacity: int,
) -> Iterator[_Change]:
    smaller = [size for size in sizes(cut.global_batch_size, cut.world) if size < cut.per_device]
    if smaller and not job.training.sorts:
        each = [estimate(model, data, job, recut(cut, size), strategy, device) for size in smaller]
        best = next((one for one in each if one.high <= capacity), each[-1])
        size = best.cut.per_device
        yield f"micro-batches of {size}", {"training.per_device_train_batch_size": size}, best
    if job.lora is not None and job.quantization is None:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        changed = estimate(
            _quantized(model, job), data, _with(job, quantization=options), cut, strategy, device
        )
        yield "4-bit weights", {f"quantization.{key}": value for key, value in options.items()}, changed
    training = job.training.options
    if not training.get("gradient_checkpointing", DEFAULTS["gradient_checkpointing"]):
        changed = estimate(model, data, _training(job, gradient_checkpointing=True), cut, strategy, device)
        yield "gradient checkpointing", {"training.gradient_checkpointing": True}, changed
    if data.tower_tokens and model.model_type not in FIXED_IMAGES:
        changed = estimate(model, _half_the_side(data), job, cut, strategy, device)
        yield "images of half the side", {"model.processor": _half_the_size(job)}, changed
    if "8bit" not in training.get("optim", DEFAULTS["optim"]):
        changed = estimate(model, data, _training(job, optim="adamw_bnb_8bit"), cut, strategy, device)
        yield "8-bit optimizer", {"training.optim": "adamw_bnb_8bit"}, changed
    if job.model.dtype == "float32":
        with_bfloat16 = job.model_copy(update={"model": job.model.model_copy(update={"dtype": "bfloat16"})})
        yield (
            "bfloat16",
            {"model.dtype": "bfloat16"},
            estimate(model, data, with_bfloat16, cut, strategy, device),
        )
    possible = [one for one in SHARDED if one != "fsdp2" or not (job.quantization or {}).get("load_in_8bit")]
    if cut.world > 1:
        for other in possible:
            if other != strategy:
                changed = estimate(model, data, job, cut, other, device)
                yield f"{other} over {cut.world} devices", {"launch.strategy": other}, changed
    yield from _more_devices(model, data, job, cut, strategy, device, capacity)


def _more_devices(
    model: ModelFacts,
    data: DataFacts,
    job: Job,
    cut: Geometry,
    strategy: Strategy,
    device: Device,
    capacity: int,
) -> Iterator[_Change]:
    """The first multiple of the devices that fits, else the last, with the same global batch."""
    best: _Change | None = None
    for times in MORE_DEVICES:
        world = cut.world * times
        usable = sizes(cut.global_batch_size, world)
        if not usable or (best is not None and best[2].high <= capacity):
            break
        if job.training.sorts and cut.per_device not in usable:  # another size would be another loss
            break
        more = geometry(job, world, at_most=cut.per_device)
        other: Strategy = strategy if strategy in SHARDED else "zero3"
        keys = {"launch.strategy": other, "launch.gpus_per_node": world // job.launch.nodes}
        best = f"{world} devices, {other}", keys, estimate(model, data, job, more, other, device)
    if best is not None:
        yield best


def _quantized(model: ModelFacts, job: Job) -> ModelFacts:
    """The model with what a quantization would pack: the text model without embedding and head, and whatever
    else is not frozen. Norms, which stay as they are, are thousandths of that."""
    embedded = model.vocabulary * model.text.hidden * (1 if model.tied_head else 2)
    kept = {"language_model": embedded}
    parts = {
        name: part
        if name in job.model.freeze
        else part.model_copy(update={"quantized": max(0, part.parameters - kept.get(name, 0))})
        for name, part in model.parts.items()
    }
    return model.model_copy(update={"parts": parts})


def _half_the_side(data: DataFacts) -> DataFacts:
    """A quarter of the pixels, of the tower's positions and of the image tokens."""
    less = data.image_tokens.largest - data.image_tokens.largest // 4

    def quarter(size: int) -> int:
        return -(-size // 4)

    image_tokens = data.image_tokens
    return data.model_copy(
        update={
            "tokens": data.tokens.model_copy(update={"largest": data.tokens.largest - less}),
            "image_tokens": image_tokens.model_copy(
                update={
                    "p50": quarter(image_tokens.p50),
                    "p95": quarter(image_tokens.p95),
                    "largest": quarter(image_tokens.largest),
                    "mean": image_tokens.mean / 4,
                }
            ),
            "pixel_values": quarter(data.pixel_values),
            "tower_tokens": quarter(data.tower_tokens),
        }
    )


def _half_the_size(job: Job) -> dict[str, Any] | None:
    """`model.processor` with the sides of its size halved; None where the job leaves the size to the model,
    or gives it in pixels of an area, as for Qwen's processors."""
    size = job.model.processor.get("size")
    if not isinstance(size, dict) or not all(type(side) is int and side < 10_000 for side in size.values()):
        return None
    return {**job.model.processor, "size": {name: side // 2 for name, side in size.items()}}


def _with(job: Job, **changes: Any) -> Job:
    return job.model_copy(update=changes)


def _training(job: Job, **options: Any) -> Job:
    return _with(job, training=job.training.model_copy(update=options))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
