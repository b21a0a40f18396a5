"""What `runner plan` says of a job, once more by the process that trains it, for the record of the run.

Counts of the model on the meta device and of the prepared rows, whose tokens are all known by now; only what
images take of them is looked at on a sample. Told with the `plan` event, so that a report can put the plan
beside what was measured without torch. It decides nothing, and what cannot be told is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.facts import DataFacts
from runner.plan import Plan
from runner.train.data.collator import Collator
from runner.train.data.measure import measure, percentiles
from runner.train.data.rows import Rows
from runner.train.models import model as models
from runner.train.models import on_meta
from runner.train.savings import Savings

SAMPLE = 64
"""Rows, evenly over the data, whose images are looked at; the longest and the largest beside them."""


def planned(plan: Plan, rows: Rows, collator: Collator, applied: Savings) -> dict[str, Any]:
    """`model` and `data`: `ModelFacts` and `DataFacts` as JSON, each null where it cannot be told.

    Before the trainer's arguments exist: DeepSpeed would take a model on the meta device apart, too.
    """
    start = None if plan.fetched.init_from is None else Path(plan.fetched.init_from)
    try:
        model = on_meta.inspect(plan.job, plan.fetched.model, start)[0].model_dump(mode="json")
    except (RunnerError, ImportError, TypeError, ValueError):
        # An adapter to start from that PEFT refuses; loading it for training says so.
        model = None
    return {"model": model, "data": _data(plan, rows, collator, applied).model_dump(mode="json")}


def _data(plan: Plan, rows: Rows, collator: Collator, applied: Savings) -> DataFacts:
    tokens, shown, areas = (rows.dataset[name][:] for name in ("tokens", "image_count", "pixels"))
    count = len(tokens)
    extremes = (max(range(count), key=numbers.__getitem__) for numbers in (tokens, shown, areas))
    looked_at = sorted({*range(0, count, max(1, count // SAMPLE)), *extremes})
    vision = models.load_config(plan.fetched.model).vision_config
    part = replace(rows, dataset=rows.dataset.select(looked_at))
    return measure(part, collator, vision, count, applied.told()).model_copy(
        update={
            "looked_at": count + len(rows.skipped),
            "tokens": percentiles(tokens),
            "images": percentiles(shown),
        }
    )
