"""One submission of a job: what a target's objects are made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import PurePath

from runner.job.resolved import resolved_yaml
from runner.manifest import Job
from runner.settings import Resolved

SUFFIX = 5
"""Characters after the job's name."""


@dataclass(frozen=True)
class Submission:
    """A job on its way to an orchestrator. The same run may have many, each under a name of its own."""

    job: Job
    text: str
    """Its complete resolved YAML."""
    name: str
    """`<job.name>-<5 characters>`: names the objects."""

    @property
    def inline(self) -> str:
        """The job on one line, as JSON, which YAML reads: 3 kB, where the text with its sources has 12."""
        return json.dumps(self.job.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)

    @property
    def labels(self) -> dict[str, str]:
        """What tells the objects of a run and of a submission from all others."""
        return {"vlm-runner/run": self.job.name, "app.kubernetes.io/instance": self.name}


def submission(resolved: Resolved, name: str | None = None) -> Submission:
    """The submission of a resolved job.

    Args:
        name: None: the job's name and the beginning of its text's SHA-256, the same for the same job, in
            whatever folder its file lies.
    """
    text = resolved_yaml(replace(resolved, sources=_without_folders(resolved)))
    digest = hashlib.sha256(text.encode()).hexdigest()[:SUFFIX]
    return Submission(resolved.job, text, name or f"{resolved.job.name}-{digest}")


def _without_folders(resolved: Resolved) -> dict[str, str]:
    """The source of each value with no more of its file than the name: folders are this machine's own."""
    if resolved.file is None:
        return resolved.sources
    here, name = f"{resolved.file}:", f"{PurePath(resolved.file).name}:"
    return {
        key: name + source.removeprefix(here) if source.startswith(here) else source
        for key, source in resolved.sources.items()
    }
