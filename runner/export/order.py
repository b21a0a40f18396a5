"""What crosses from `runner export` to `runner.train.export`, and back, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runner.export.likeness import Compared, Steps
from runner.manifest import Job

Kind = Literal["adapter", "merged", "model"]
"""An adapter as it is, an adapter in its base, or all of a model that was trained whole."""


class Order(BaseModel):
    """What to write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    job: Job
    """As the run has it."""
    base: str
    """Folder of the base model."""
    trained: Path
    """Folder of the adapter, or of the whole model."""
    dtype: str
    """Of a merged model's weights."""
    compare: int
    """Questions that a merged model is compared on; 0: none."""
    evals: list[str]
    """Where each of the job's `datasets.eval` lies; empty if nothing is compared."""
    recorded: Path | None
    """Predictions that the run made with what is exported."""
    to: Path
    """A new folder."""


class Made(BaseModel):
    """What was written."""

    model_config = ConfigDict(frozen=True)

    quantization: dict[str, Any] | None
    """Arguments of the BitsAndBytesConfig that the run's base was loaded with."""
    answer: Steps
    """What this runner's own loading answers to the question of `runner.train.plain`."""
    input_ids: list[int]
    """The question, as the run's own processor makes tokens of it."""
    compared: Compared | None
    metrics: dict[str, dict[str, Any] | None]
    """Over the questions that were compared: `run`, what the run measured; `merged`."""
    like_run: int | None
    """Of their answers those that are the run's own, word for word; None where it has none for each."""
