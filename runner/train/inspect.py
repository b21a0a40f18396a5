"""`python -m runner.train.inspect QUESTION ANSWER`: what a plan asks of torch, without GPU and weights.

    model        configuration -> meta device, quantized, adapted: counts                 .models.on_meta
    processor    built with the job's arguments
    columns      every source opened: path, split, columns
    rows         read, decoded and counted by the code that trains, all or a sample       .data.measure
    answers      what carries loss, as the audit before step 1

A check that fails does not keep the others from being made, unless they need what it did not find. What is
not foreseen is a traceback in the log, and no answer.
"""

from __future__ import annotations

import runner.train.deferred  # noqa: F401 (before others import what it imports)

# isort: split

import functools
import sys
from pathlib import Path

from transformers import ProcessorMixin
from transformers.utils import logging as transformers_logging

from runner.durable import write_text
from runner.facts import QUICK, Answer, DataFacts, Question
from runner.findings import Findings
from runner.manifest import Source
from runner.train import preparation
from runner.train.data.audit import audit
from runner.train.data.collator import Collator
from runner.train.data.measure import measure
from runner.train.data.rows import Rows
from runner.train.data.sources import open_source
from runner.train.models import model as models
from runner.train.models import on_meta
from runner.train.savings import savings

_NEEDS = "it needs the processor and every source"


def inspect(question: Question) -> Answer:
    """Everything, in this process."""
    return _Inspection(question).answer()


class _Inspection:
    """The checks of one job, in their order."""

    def __init__(self, question: Question) -> None:
        self.job, self.fetched = question.job, question.fetched
        self.at_most = QUICK if question.sample is None else question.sample
        self.checks = Findings()
        self.notes: list[str] = []

    def answer(self) -> Answer:
        start = None if self.fetched.init_from is None else Path(self.fetched.init_from)
        found = self.checks.make("model", lambda: on_meta.inspect(self.job, self.fetched.model, start))
        model, weight_bytes = (None, 0) if found is None else found
        processor = self.checks.make("processor", lambda: models.load_processor(self.job, self.fetched.model))
        train = self._columns("train", self.job.datasets.train, self.fetched.train)
        held_out = self._columns("eval", self.job.datasets.eval, self.fetched.eval)
        data = self._train(processor, train)
        self._eval(processor, held_out)
        most = None if self.job.evaluation is None else self.job.evaluation.max_samples
        return Answer(
            model=model,
            weight_bytes=weight_bytes,
            data=data,
            eval_rows=None if held_out is None else min(held_out, most or held_out),
            findings=self.checks.made,
            notes=self.notes,
        )

    def _columns(self, name: str, sources: list[Source], locations: list[str]) -> int | None:
        """Rows that the sources have for the job; None where one cannot be opened."""
        total: int | None = 0
        for number, (source, location) in enumerate(zip(sources, locations, strict=True)):
            key = f"datasets.{name}[{number}]"
            look = functools.partial(open_source, source, location, key)
            opened = self.checks.make(f"columns of {key}", look)
            if opened is None or total is None:
                total = None
            else:
                total += min(len(opened.table), source.max_samples or len(opened.table))
        return total

    def _train(self, processor: ProcessorMixin | None, total: int | None) -> DataFacts | None:
        name = "rows of datasets.train"
        if processor is None or total is None:
            self.checks.skip(name, _NEEDS)
            return None
        job, folder = self.job, self.fetched.model

        def prepare() -> tuple[Rows, Collator, DataFacts]:
            limit = preparation.token_limit(job, folder)
            rows = preparation.train_rows(job, self.fetched.train, processor, limit, self.at_most)
            applied = savings(job, rows, processor, folder)
            collator = preparation.collator(job, processor, rows, applied)
            everything = len(rows.dataset) + len(rows.skipped) == total
            vision = models.load_config(folder).vision_config
            count = len(rows.dataset) if everything else total
            return rows, collator, measure(rows, collator, vision, count, applied.told())

        prepared = self.checks.make(name, prepare)
        if prepared is None:
            return None
        rows, collator, facts = prepared
        self._note(rows)
        self.checks.make("answers of datasets.train", lambda: audit(rows, collator, processor))
        return facts

    def _eval(self, processor: ProcessorMixin | None, total: int | None) -> None:
        name = "rows of datasets.eval"
        if not self.job.datasets.eval:
            return
        if processor is None or total is None:
            self.checks.skip(name, _NEEDS)
            return

        def prepare() -> Rows | None:
            limit = preparation.token_limit(self.job, self.fetched.model)
            return preparation.eval_rows(self.job, self.fetched.eval, processor, limit, self.at_most)

        if (rows := self.checks.make(name, prepare)) is not None:
            self._note(rows)

    def _note(self, rows: Rows) -> None:
        self.notes += [f"{row} is skipped: {reason}" for row, reason in rows.skipped]
        self.notes += rows.notes


def main(arguments: list[str]) -> int:
    """Read the question, write the answer. Returns 0."""
    question, answer = map(Path, arguments)
    transformers_logging.disable_progress_bar()
    asked = Question.model_validate_json(question.read_text(encoding="utf-8"))
    write_text(answer, inspect(asked).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
