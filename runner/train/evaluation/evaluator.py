"""Evaluation as a stage of a run: when it is due, in which precision, what it writes and tells.

    evaluation/before.json, after.json, step-<n>.json    metrics, and the part of the job that they hold for
    evaluation/<label>.predictions.jsonl                 every row: question, truth, prediction, verdicts
    evaluation/images.zip                                small copies of the images of the first rows

Of pairs, the predictions before training hold how likely the model that training starts from finds both
answers: the reference that later evaluations are rewarded against. How an answer is generated and scored is
`evaluate`'s, what right means `metrics`' and `pair_metrics`'s.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import ProcessorMixin
from trl import DPOConfig

from runner.durable import write_json, write_text
from runner.errors import Preempted, RunnerError
from runner.manifest import Evaluation as Spec
from runner.plan import Plan
from runner.train.channel import Channel
from runner.train.data.rows import Rows
from runner.train.evaluation.evaluate import Evaluation, Reference, evaluate
from runner.train.evaluation.thumbnails import illustrated
from runner.train.memory import memory_named
from runner.train.models import model as models
from runner.train.world import device, from_first, world

BEFORE = "before"
PREDICTIONS = "{}.predictions.jsonl"
_DURING = (
    "steps",
    "minutes",
    "loss",
    "metric_for_best_model",
    "early_stopping_patience",
    "early_stopping_threshold",
)
"""Keys that say nothing about an evaluation before training: it holds when they change."""


class Evaluator:
    """Generation on the evaluation rows, its files and its events."""

    def __init__(
        self,
        plan: Plan,
        channel: Channel,
        model: torch.nn.Module,
        processor: ProcessorMixin,
        rows: Rows | None,
    ) -> None:
        self._plan = plan
        self._channel = channel
        self._model = model
        self._processor = processor
        self._rows = rows
        self._folder = plan.run_dir / "evaluation"

    def baseline(self) -> dict[str, Any] | None:
        """Metrics of the model that training starts from: the base or, where `adapter.keeps_reference`, the
        adapter over it. Kept from an earlier attempt where it got so far."""
        job = self._plan.job
        if job.evaluation is None or not job.evaluation.baseline:
            return None
        kept = from_first(self._kept(job.evaluation))
        return kept or self.run(BEFORE, "evaluate_before", step=0)

    def _kept(self, spec: Spec) -> dict[str, Any] | None:
        file = self._folder / f"{BEFORE}.json"
        if not file.exists():
            return None
        saved = json.loads(file.read_text(encoding="utf-8"))
        metrics: dict[str, Any] = saved["metrics"]
        then = {key: value for key, value in saved["evaluation"].items() if key not in _DURING}
        return metrics if then == spec.model_dump(mode="json", exclude=set(_DURING)) else None

    def during(self, step: int) -> dict[str, Any] | None:
        """Metrics at a step; None when a request to stop cut it off."""
        try:
            return self.run(f"step-{step:08d}", "evaluate", step=step, when="during")
        except Preempted:
            return None

    def run(self, label: str, phase: str, step: int, when: str | None = None) -> dict[str, Any] | None:
        """Generate, score, write `evaluation/<label>.json` and its predictions, tell the supervisor.

        Raises:
            Preempted: asked to stop.
        """
        plan, rows = self._plan, self._rows
        if plan.job.evaluation is None or rows is None:
            return None
        self._channel.send("phase", phase=phase)
        size = plan.job.evaluation.batch_size
        message = f"{phase.replace('_', ' ')}: out of memory. Remedy: an evaluation.batch_size below {size}"
        with memory_named(RunnerError, message):
            reference = from_first(self._reference(label))
            result = self._generated(rows, plan.job.evaluation, phase, reference)
        if result is None:
            raise Preempted(f"stopped in {phase.replace('_', ' ')}; the state before it is saved")
        if world().first:
            self._write(label, result)
        self._channel.send("evaluation", when=when or label, step=step, metrics=result.metrics)
        return result.metrics

    def _reference(self, label: str) -> Reference | None:
        """What the model before training made of the pairs, where that was evaluated:

        method  label     baseline  purpose   reference
        sft     any       any       any       -
        dpo     before    any       train     -          the policy is the reference
        dpo     another   yes       train     this run's; - if somebody removed it
        dpo     another   no        train     -
        dpo     any       any       evaluate  the plan's, or -
        """
        job = self._plan.job
        path = self._plan.reference
        if self._plan.purpose == "train" and job.evaluation is not None and job.evaluation.baseline:
            path = self._folder / PREDICTIONS.format(BEFORE)
        if job.method != "dpo" or label == BEFORE or path is None or not path.is_file():
            return None
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        beta = job.training.options.get("beta", DPOConfig.beta)
        return Reference(beta, records)

    def _generated(
        self, rows: Rows, spec: Spec, phase: str, reference: Reference | None
    ) -> Evaluation | None:
        with _precision(self._plan):
            return evaluate(
                self._model,
                self._processor,
                rows,
                spec,
                reference=reference,
                on_progress=lambda done, total: self._channel.send(
                    "progress", phase=phase, done=done, total=total
                ),
                should_stop=lambda: self._channel.request().action == "stop",
            )

    def _write(self, label: str, result: Evaluation) -> None:
        assert self._plan.job.evaluation is not None
        self._folder.mkdir(exist_ok=True)
        assert self._rows is not None
        records = illustrated(result.records, self._rows, self._folder)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(self._folder / PREDICTIONS.format(label), lines)
        spec = self._plan.job.evaluation.model_dump(mode="json")
        write_json(
            self._folder / f"{label}.json", {"format": 1, "evaluation": spec, "metrics": result.metrics}
        )


def _precision(plan: Plan) -> AbstractContextManager[Any]:
    """The precision that training runs in, for a forward outside the trainer."""
    dtype = models.DTYPES[plan.job.model.dtype]
    if dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device().type, dtype=dtype)
