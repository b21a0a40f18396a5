"""The matrix's rows of evaluation: what it needs, and which metric fits which method. Pure.

`runner.job.matrix` has the table.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.job.cells import Section
from runner.job.shape import Finding

OF_ONE_ANSWER = ("relaxed_accuracy", "exact_match")
OF_TWO_ANSWERS = ("preference_accuracy", "reward_accuracy")


def evaluated(job: Section, training: Section) -> Iterator[Finding]:
    """Every row of the table."""
    section = job.get("evaluation")
    if isinstance(section, dict):
        for key in ("metric", "metric_for_best_model"):
            yield from _metric(job.get("method", "sft"), key, section.get(key))
        yield from _best(section)
    datasets = job.get("datasets")
    if isinstance(datasets, dict) and not datasets.get("eval"):
        yield from _without_rows(section, training)


def _metric(method: object, key: str, metric: object) -> Iterator[Finding]:
    path = ("evaluation", key)
    if method == "dpo" and metric in OF_ONE_ANSWER:
        reason = f"{metric} compares with the one right answer, and pairs of method dpo have none"
        yield Finding(path, reason, "remove it, or use preference_accuracy")
    elif method == "sft" and metric in OF_TWO_ANSWERS:
        reason = f"{metric} compares two answers, and rows of method sft have one"
        yield Finding(path, reason, "remove it, or use relaxed_accuracy or exact_match")


def _best(section: Section) -> Iterator[Finding]:
    metric = section.get("metric_for_best_model")
    path = ("evaluation", "metric_for_best_model")
    if section.get("steps") is not None and section.get("minutes") is not None:
        reason = "evaluation.steps says already when it is due"
        yield Finding(("evaluation", "minutes"), reason, "remove one of the two")
    if metric is not None and section.get("steps") is None and section.get("minutes") is None:
        reason = "there is no evaluation during training to choose from"
        yield Finding(path, reason, "add evaluation.steps or evaluation.minutes")
    if metric == "reward_accuracy" and section.get("baseline") is False:
        reason = "rewards are measured against the model before training, which baseline: false leaves out"
        yield Finding(path, reason, "remove baseline: false, or use preference_accuracy")
    if metric == "loss" and section.get("loss") is False:
        yield Finding(path, "evaluation.loss is false", "remove that, or use another metric")
    if metric is None and section.get("early_stopping_patience") is not None:
        reason = "nothing says what has to improve"
        yield Finding(("evaluation", "early_stopping_patience"), reason, "add metric_for_best_model")


def _without_rows(section: object, training: Section) -> Iterator[Finding]:
    reason, remedy = "there is no datasets.eval to evaluate on", "add datasets.eval, or remove it"
    if isinstance(section, dict):
        yield Finding(("evaluation",), reason, remedy)
    if training.get("eval_strategy") in ("steps", "epoch"):
        yield Finding(("training", "eval_strategy"), reason, remedy)
    elif training.get("eval_on_start") is True:
        yield Finding(("training", "eval_on_start"), reason, remedy)
