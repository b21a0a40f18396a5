"""The rows of a job as every purpose prepares them: a trainer before step 1, and `inspect` for a plan."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import ProcessorMixin

from runner.manifest import Job
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows, load
from runner.train.models import model as models
from runner.train.savings import Savings


def token_limit(job: Job, folder: str) -> int:
    """Tokens that a row may have: as the job says, else as the model in `folder` allows."""
    if job.datasets.max_length is not None:
        return job.datasets.max_length
    return int(models.load_config(folder).get_text_config().max_position_embeddings)


def train_rows(
    job: Job, locations: Sequence[str], processor: ProcessorMixin, limit: int, at_most: int | None = None
) -> Rows:
    """The rows that are trained on.

    Args:
        locations: where each of `datasets.train` lies.
        at_most: only so many of them, drawn by seed; None: all.

    Raises:
        DataError: as `runner.train.data.rows.load` does.
    """
    sources = job.datasets.train
    return load(sources, locations, job.datasets, job.seed, processor, limit, "train", at_most)


def eval_rows(
    job: Job, locations: Sequence[str], processor: ProcessorMixin, limit: int, at_most: int | None = None
) -> Rows | None:
    """The rows that are evaluated on, `at_most` so many of them; None of a job that has none.

    Raises:
        DataError: as `runner.train.data.rows.load` does.
    """
    if not job.datasets.eval:
        return None
    bounds = [at_most, None if job.evaluation is None else job.evaluation.max_samples]
    few = min((bound for bound in bounds if bound is not None), default=None)
    return load(job.datasets.eval, locations, job.datasets, job.seed, processor, limit, "eval", few)


def collator(job: Job, processor: ProcessorMixin, rows: Rows, applied: Savings) -> Collator:
    """What makes batches of the rows for the job's model.

    Args:
        applied: which savings are in force.
    """
    prefixes = applied.share_prompt is None
    return Collator(
        processor,
        rows.form,
        models.DTYPES[job.model.dtype],
        images_once=prefixes or applied.encode_once is None,
        prefixes=prefixes,
    )
