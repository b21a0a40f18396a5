"""How many of the worst rows fit at once: tried before step 1, in this process, and undone.

    one row          forward, backward, optimizer step: gradients and moments are there from now on
    largest size     forward and backward on top of them
    out of memory    the next smaller size, down to 1
    afterwards       parameters, gradients, optimizer, generators and metrics are as they were

A batch of the worst rows holds the row with the most tokens, which every other row is padded to, and for the
rest copies of the row with the most pixels. Tokens were counted when the rows were checked; pixels are those
of the `LOOKED_AT` rows with most tokens, as many with most images and as many with the largest, really
processed.

The first size is the largest that the plan allows. Without a GPU it is at most `MOST_ON_CPU`: a CPU has no
memory of its own to fill, the machine would swap instead of refusing, and more rows at once are not faster.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import release_memory

from runner.errors import OutOfMemory
from runner.plan import Geometry, recut, sizes
from runner.train import gathering, rng
from runner.train.channel import Channel
from runner.train.data.rows import Rows
from runner.train.memory import is_out_of_memory, memory_named
from runner.train.trainer import RunTrainer
from runner.train.world import device

MOST_ON_CPU = 8

LOOKED_AT = 4

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Row]], dict[str, Any]]


@dataclass(frozen=True)
class Worst:
    """The rows that need the most memory."""

    longest: Row
    """Most tokens."""
    largest: Row
    """Most pixels."""

    def batches(self, size: int) -> list[list[Row]]:
        """Batches of `size` rows that all others are smaller than; of one row, one for each kind."""
        if size == 1:
            return [[self.longest], [self.largest]]
        # Copies, but of other images: rows that show the same would share the work.
        copies = [{**self.largest, "pictures": f"copy {number}"} for number in range(1, size)]
        return [[self.longest, *copies]]


def fitting(trainer: RunTrainer, collate: Collate, rows: Rows, cut: Geometry, channel: Channel) -> Geometry:
    """The cut of the same global batch with the largest per-device size that fits.

    Args:
        cut: the largest one that may be tried.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    channel.send("phase", phase="probe")
    most = largest(cut).per_device
    with rng.preserved(), _undone(trainer):
        channel.send("probe", per_device=1)
        with memory_named(OutOfMemory, "the longest row alone does not fit"):
            heaviest = worst(rows, collate)
            _pass(trainer, collate([heaviest.longest]))
            trainer.optimizer.optimizer.step()  # not through accelerate, which would ask the loss scaler
        for size in sizes(cut.global_batch_size, cut.world):
            tried = recut(cut, size)
            if size <= most and _fits(trainer, collate, heaviest.batches(size), tried, channel):
                return tried
    raise OutOfMemory("a single row does not fit beside its gradients and the optimizer's state")


def largest(cut: Geometry) -> Geometry:
    """The cut with the largest size that is worth a try."""
    most = cut.per_device if device().type == "cuda" else min(cut.per_device, MOST_ON_CPU)
    return recut(cut, next(size for size in sizes(cut.global_batch_size, cut.world) if size <= most))


def _fits(
    trainer: RunTrainer, collate: Collate, batches: list[list[Row]], cut: Geometry, channel: Channel
) -> bool:
    channel.send("probe", per_device=cut.per_device)
    # Without a GPU the micro-batches that wait for their turn in a step are in the same memory, and so is the
    # one that accelerate has fetched ahead.
    waiting = cut.accumulation if device().type == "cpu" else 0
    fits = True
    try:
        for rows in batches:
            batch = collate(rows)
            held = [copy.deepcopy(batch) for _ in range(waiting)]
            _pass(trainer, batch)
            del held
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # Outside the handler: its traceback holds the tensors of the failed pass.
    release_memory()
    return fits


def _pass(trainer: RunTrainer, batch: dict[str, Any]) -> None:
    """Forward and backward of one micro-batch as training does them; gradients add up."""
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.training_step(trainer.model_wrapped, batch, items)


@contextlib.contextmanager
def _undone(trainer: RunTrainer) -> Iterator[None]:
    """Inside, the trainer is as ready as in its loop; afterwards, as if it never had been."""
    parameters = gathering.trainable(trainer.model).values()
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    metrics, tokens = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    trainer._prepare_for_training(trainer.args.max_steps, None, None)
    trainer.current_gradient_accumulation_steps = 1
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.grad = None
                parameter.copy_(values)
        trainer._micro.clear()
        trainer._metrics, trainer._total_train_tokens = metrics, tokens
        # The loop makes its own again.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
        trainer.accelerator.free_memory()
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the record of steps is about training


def worst(rows: Rows, collate: Collate) -> Worst:
    """The rows that need the most memory; see the module for how many are really processed."""
    tokens, images, areas = (rows.dataset[name][:] for name in ("tokens", "image_count", "pixels"))
    numbers = range(len(tokens))
    by_tokens = sorted(numbers, key=lambda number: -tokens[number])[:LOOKED_AT]
    by_images = sorted(numbers, key=lambda number: (-images[number], -tokens[number]))[:LOOKED_AT]
    by_pixels = sorted(numbers, key=lambda number: -areas[number])[:LOOKED_AT]
    candidates = {*by_tokens, *by_images, *by_pixels}
    looked_at = {number: pixels(collate([rows.dataset[number]])) for number in candidates}
    largest = max(looked_at, key=lambda number: (looked_at[number], tokens[number]))
    return Worst(longest=rows.dataset[by_tokens[0]], largest=rows.dataset[largest])


def pixels(batch: Mapping[str, Any]) -> int:
    """Numbers in the pixel values of a batch."""
    return sum(
        value.numel()
        for name, value in batch.items()
        if name.startswith("pixel_values") and isinstance(value, torch.Tensor)
    )
