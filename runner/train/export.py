"""`python -m runner.train.export ORDER OUTCOME`: writes what a run has trained, so that it stands for itself.

    adapter    its files, the processor; loaded over the base as it trained, and asked one question
    model      the same of a model that was trained whole
    merged     base without quantization + adapter -> answers -> merged -> saved -> loaded from there
               -> answers, which must be the same (`runner.export.likeness`)

One model is in memory at a time. The answer to `runner.train.plain`'s question is what a fresh process has to
give, too. It ends as `runner.train` does: with an outcome file, or a traceback in its log.
"""

from __future__ import annotations

import runner.train.deferred  # noqa: F401 (before others import what it imports)

# isort: split

import dataclasses
import gc
import json
import random
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import logging as transformers_logging

from runner.durable import disk, write_json
from runner.errors import DataError, RunnerError
from runner.export.likeness import TOLERANCE, Compared, Likeness, Step, Steps, compared, likeness
from runner.export.order import Made, Order
from runner.manifest import Evaluation as Spec
from runner.manifest import Job
from runner.train import merging, plain, preparation
from runner.train.channel import Channel
from runner.train.data.rows import Rows
from runner.train.evaluation import metrics, pair_metrics
from runner.train.evaluation.evaluate import Evaluation, evaluate
from runner.train.listening import Listener
from runner.train.memory import memory_named
from runner.train.models import model as models
from runner.train.models.architectures import parts
from runner.train.tensor_files import writing

OUT_OF_MEMORY = (
    "export: out of memory. Remedy: a machine with more memory, --dtype bfloat16, or an adapter alone, "
    "without --merged"
)


NOTHING: dict[str, Any] = {"metrics": {}, "like_run": None}
"""What is measured where nothing is compared."""


def export(order: Order, channel: Channel) -> Made:
    """Write the folder and answer from it.

    Raises:
        DataError: what was trained does not load, or the merged model is another one.
        JobError: it cannot be merged as it was trained.
        StorageError, AccessDenied: the disk.
    """
    transformers_logging.disable_progress_bar()
    processor = models.load_processor(order.job, order.base)
    if order.kind == "merged":
        said, likenesses, measured = _merged(order, channel, processor)
    else:
        said, likenesses, measured = _as_it_is(order, channel, processor), None, NOTHING
    return Made(
        quantization=None if order.kind != "adapter" else _quantization(order),
        answer=said,
        input_ids=plain.question(processor)["input_ids"][0].tolist(),
        compared=likenesses,
        **measured,
    )


def _as_it_is(order: Order, channel: Channel, processor: ProcessorMixin) -> Steps:
    channel.send("phase", phase="loading the base and the adapter")
    with writing("write the export", order.to):
        shutil.copytree(order.trained, order.to)
        processor.save_pretrained(order.to)
    if order.kind == "model":
        whole = merging.unquantized(order.job, order.job.model.dtype)
        return _answer(models.load_base(whole, str(order.to)), order.to)
    adapted = models.load_adapter(models.load_base(order.job, order.base), order.to)
    merging.check_finite(adapted, order.trained)
    return _answer(adapted, order.to)


def _merged(
    order: Order, channel: Channel, processor: ProcessorMixin
) -> tuple[Steps, Compared | None, dict[str, Any]]:
    job = merging.unquantized(order.job, order.dtype)
    rows = _questions(order, processor) if order.compare else None
    channel.send("phase", phase="loading the unquantized base and the adapter")
    adapted = merging.beside(job, order.base, order.trained)
    merging.check_base_kept(adapted, order.job)
    before = Listener()
    if rows is not None:
        _heard(job, adapted, processor, rows, before, channel, "asking base + adapter")
    channel.send("phase", phase="merging")
    model = merging.merged(adapted)
    merging.save(model, processor, order.to)
    del model, adapted
    gc.collect()  # the two know each other; there shall be room for the next
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    channel.send("phase", phase="loading the merged model")
    again = models.load_base(job, str(order.to))
    if rows is None:
        return _answer(again, order.to), None, NOTHING
    after = Listener(before.heard)
    found = _heard(job, again, processor, rows, after, channel, "asking the merged model")
    same = _compare(order, rows, before.heard, after.heard)
    return _answer(again, order.to), same, _beside_the_run(order, rows, found)


def _questions(order: Order, processor: ProcessorMixin) -> Rows:
    """Rows that the job evaluates on, as many as wanted, drawn by seed."""
    limit = preparation.token_limit(order.job, order.base)
    rows = preparation.eval_rows(order.job, order.evals, processor, limit)
    assert rows is not None
    total = len(rows.dataset)
    drawn = random.Random(order.job.seed).sample(range(total), min(order.compare, total))
    return dataclasses.replace(rows, dataset=rows.dataset.select(sorted(drawn)))


def _heard(
    job: Job,
    model: torch.nn.Module,
    processor: ProcessorMixin,
    rows: Rows,
    listener: Listener,
    channel: Channel,
    phase: str,
) -> Evaluation:
    channel.send("phase", phase=phase)
    found = evaluate(
        model,
        processor,
        rows,
        job.evaluation or Spec(),
        on_progress=lambda done, total: channel.send("progress", phase=phase, done=done, total=total),
        should_stop=lambda: False,  # who asks to stop ends this process
        answer=listener,
    )
    assert found is not None
    return found


def _compare(order: Order, rows: Rows, before: Sequence[Steps], after: Sequence[Steps]) -> Compared:
    """
    Raises:
        DataError: an answer is another one for more than rounding.
    """
    tolerance = TOLERANCE[order.dtype]
    found = [likeness(one, other, tolerance) for one, other in zip(before, after, strict=True)]
    if any(not one.within for one in found):
        raise DataError(_disagreement(rows, found, tolerance, order.dtype))
    return compared(found, tolerance)


def _disagreement(rows: Rows, found: Sequence[Likeness], tolerance: float, dtype: str) -> str:
    odd = [(number, one) for number, one in enumerate(found) if not one.within]
    number, worst = max(odd, key=lambda one: one[1].apart)
    row = rows.dataset[number]
    where = f"{row['row']} ({row['question']!r}), token {worst.at + 1}"
    return (
        f"export: the merged model is not base + adapter: of {len(found)} answers {len(odd)} are off by "
        f"more than rounding. The worst: {where}: a logit differs by {worst.apart:.1e} of the largest, "
        f"and {dtype} allows {tolerance:.0e}. Nothing was written; remedy: export it without --merged, "
        "or merge with --dtype float32 if that agrees; and report it, with the job: this should not happen"
    )


def _beside_the_run(order: Order, rows: Rows, merged: Evaluation) -> dict[str, Any]:
    """What the run itself made of these questions, and what the merged model makes of them."""
    recorded = _recorded(order, merged)
    if recorded is None:
        return {"metrics": {"run": None, "merged": merged.metrics}, "like_run": None}
    pairs = rows.form == "preference"
    run = pair_metrics.summarize(recorded, None) if pairs else metrics.summarize(recorded)
    like = sum(
        one["prediction"] == other["prediction"] for one, other in zip(recorded, merged.records, strict=True)
    )
    return {"metrics": {"run": run, "merged": merged.metrics}, "like_run": like}


def _recorded(order: Order, merged: Evaluation) -> list[dict[str, Any]] | None:
    """The run's own predictions for these questions; None unless it has one for each."""
    if order.recorded is None:
        return None
    with disk("read the run's predictions", order.recorded):
        lines = order.recorded.read_text(encoding="utf-8").splitlines()
    known = {(record["row"], record["question"]): record for record in map(json.loads, lines)}
    found = [known.get((record["row"], record["question"])) for record in merged.records]
    records = [record for record in found if record is not None]
    return records if len(records) == len(found) else None


def _answer(model: torch.nn.Module, folder: Path) -> Steps:
    """What a model says to the question of the load check, through the processor that was written."""
    found = plain.answer(model.eval(), AutoProcessor.from_pretrained(folder))
    return tuple(Step.model_validate(step) for step in found["steps"])


def _quantization(order: Order) -> dict[str, Any] | None:
    """The job's, with the modules that this runner leaves out of it."""
    config = models.quantization(order.job, parts(models.load_config(order.base).model_type))
    if config is None:
        return None
    given = dict(order.job.quantization or {})
    given["llm_int8_skip_modules"] = list(config.llm_int8_skip_modules)
    if config.load_in_4bit:
        given.setdefault("bnb_4bit_compute_dtype", order.job.model.dtype)
    return given


def main(order_file: Path, outcome_file: Path) -> int:
    """Run the order and write its outcome. Returns the exit code that the outcome names."""
    with disk("read the order", order_file):
        order = Order.model_validate_json(order_file.read_text(encoding="utf-8"))
    channel = Channel.from_environment(order_file.parent)
    outcome: dict[str, Any]
    try:
        with memory_named(RunnerError, OUT_OF_MEMORY):
            made = export(order, channel)
        outcome = {"outcome": "done", "exit_code": 0, "facts": made.model_dump(mode="json")}
    except RunnerError as error:
        traceback.print_exc()
        outcome = {"outcome": error.outcome, "exit_code": error.exit_code, "error": str(error)}
    write_json(outcome_file, outcome)
    return int(outcome["exit_code"])


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
