"""What would make a job fit a device, and which strategy is simple enough. Everything is estimated again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.facts import DataFacts, ModelFacts
from runner.job.matrix_strategies import refused
from runner.manifest import Job
from runner.memory.estimate import Estimate, Verdict, estimate
from runner.memory.subject import Subject
from runner.plan import Strategy, geometry, recut, sizes

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


def choose(it: Subject, capacity: int | None, possible: Sequence[Strategy] = ("zero2", "zero3")) -> Choice:
    """The simplest strategy whose high end fits: what is not needed costs time on the wire.

        world   ddp fits   zero2 fits   zero3 fits   strategy
            1   -          -            -            single
          > 1   yes        -            -            ddp
          > 1   no         yes          -            zero2
          > 1   no         no           yes          zero3
          > 1   no         no           no           zero3, and the reason says so
        > 1   nobody knows the capacity            ddp, and the reason says so

    Args:
        it: of any strategy.
        capacity: bytes of one device (`Gpu.usable`); None where its type is not known.
        possible: what the job can train under besides ddp, the simplest first.
    """
    if it.cut.world == 1:
        return Choice("single", "one process")
    if capacity is None:
        high = estimate(replace(it, strategy="ddp")).high
        return Choice("ddp", f"the simplest; what a device has is not known, and it may need {_gib(high)}")
    tried: list[str] = []
    order = ("ddp", *(one for one in possible if not _wants_images(it, one)))
    if it.job.training.per_device_train_batch_size == "auto":
        it = replace(it, cut=recut(it.cut, 1))  # what fits with one row at once; how many more is found later
    for strategy in order:
        high = estimate(replace(it, strategy=strategy)).high
        if high <= capacity:
            above = f"; {' and '.join(tried)} may need more than the device has" if tried else ""
            return Choice(strategy, f"needs at most {_gib(high)} of {_gib(capacity)}{above}")
        tried.append(f"{strategy} ({_gib(high)})")
    return Choice(order[-1], f"needs least; nothing surely fits {_gib(capacity)}: {', '.join(tried)}")


def levers(it: Subject, capacity: int) -> list[Lever]:
    """The single changes that save memory and that `validate` and the rows take, the largest saving first.

    Args:
        capacity: bytes of one device (`Gpu.usable`).
    """
    now = estimate(it).high
    found = []
    for change in _changes(it, capacity):
        made = estimate(change.made)
        strategy = change.made.strategy
        if made.high < now and not (refused(change.made.job, strategy) or _wants_images(it, strategy)):
            found.append(Lever(change.name, change.keys, made, now - made.high, made.verdict(capacity)))
    return sorted(found, key=lambda lever: -lever.saves)


def _wants_images(it: Subject, strategy: Strategy) -> bool:
    """Whether weights in parts, which want an image in every row or in none, meet rows that have none among
    others."""
    return strategy in ("zero3", "fsdp2") and it.data.images.largest > 0 and it.data.images.mean < 1


@dataclass(frozen=True)
class _Change:
    """What a lever turns a job into."""

    name: str
    keys: dict[str, Any]
    made: Subject


def _changes(it: Subject, capacity: int) -> Iterator[_Change]:
    job = it.job
    smaller = [size for size in sizes(it.cut.global_batch_size, it.cut.world) if size < it.cut.per_device]
    if smaller and not job.training.sorts:
        each = [replace(it, cut=recut(it.cut, size)) for size in smaller]
        best = _first_that_fits(each, capacity)
        size = best.cut.per_device
        yield _Change(f"micro-batches of {size}", {"training.per_device_train_batch_size": size}, best)
    if job.lora is not None and job.quantization is None:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        made = replace(it, model=_quantized(it.model, job), job=_with(job, quantization=options))
        yield _Change("4-bit weights", {f"quantization.{key}": value for key, value in options.items()}, made)
    if not it.option("gradient_checkpointing"):
        made = replace(it, job=_training(job, gradient_checkpointing=True))
        yield _Change("gradient checkpointing", {"training.gradient_checkpointing": True}, made)
    if it.data.tower_tokens and it.model.model_type not in FIXED_IMAGES:
        made = replace(it, data=_half_the_side(it.data))
        yield _Change("images of half the side", {"model.processor": _half_the_size(job)}, made)
    if "8bit" not in it.option("optim"):
        made = replace(it, job=_training(job, optim="adamw_bnb_8bit"))
        yield _Change("8-bit optimizer", {"training.optim": "adamw_bnb_8bit"}, made)
    if job.model.dtype == "float32":
        made = replace(it, job=_with(job, model=job.model.model_copy(update={"dtype": "bfloat16"})))
        yield _Change("bfloat16", {"model.dtype": "bfloat16"}, made)
    if it.cut.world > 1:
        for other in SHARDED:
            if other != it.strategy:
                name = f"{other} over {it.cut.world} devices"
                yield _Change(name, {"launch.strategy": other}, replace(it, strategy=other))
    yield from _more_devices(it, capacity)


def _more_devices(it: Subject, capacity: int) -> Iterator[_Change]:
    """The first multiple of the devices that fits, else the last, with the same global batch."""
    strategy: Strategy = it.strategy if it.strategy in SHARDED else "zero3"
    made = []
    for times in MORE_DEVICES:
        world = it.cut.world * times
        usable = sizes(it.cut.global_batch_size, world)
        if not usable:
            break
        if it.job.training.sorts and it.cut.per_device not in usable:  # another size would be another loss
            break
        cut = geometry(it.job, world, at_most=it.cut.per_device)
        made.append(replace(it, cut=cut, strategy=strategy))
    if made:
        best = _first_that_fits(made, capacity)
        world = best.cut.world
        keys = {"launch.strategy": strategy, "launch.gpus_per_node": world // it.job.launch.nodes}
        yield _Change(f"{world} devices, {strategy}", keys, best)


def _first_that_fits(made: Sequence[Subject], capacity: int) -> Subject:
    """Else the last."""
    return next((one for one in made if estimate(one).high <= capacity), made[-1])


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
