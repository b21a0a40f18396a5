"""Generated files, and what generates them.

    upstream.json   the fields of the pinned SFTConfig, DPOConfig, LoraConfig and BitsAndBytesConfig
    job.json        the JSON Schema of a job: what `runner.job.check` judges by, and what editors read

`make schema` writes both, and docs/training-options.md; a test fails when they are stale.
"""

from __future__ import annotations

from pathlib import Path


def job_schema_text() -> str:
    """The JSON Schema of a job, as text; what `runner schema` prints and `runner.job.check` judges by."""
    return (Path(__file__).parent / "job.json").read_text("utf-8")
