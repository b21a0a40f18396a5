"""What makes a run the same run: `run.json` in its store, written once, compared at every start.

A copy lies in `runs/<name>/`: for `runner evaluate`, and to tell a run whose store is gone from a new one.

Everything in a job defines the run, but for two groups of keys:

    may change, nothing follows         checkpoints, datasets.num_proc, training.logging_* and the like;
                                        resources, kubernetes, aws_batch, gcp_batch (`FREE`);
                                        evaluation.steps, minutes, loss (`DURING`), which are announced where
                                        the best of them is exported
    may change, bits may differ         launch, speed, training.per_device_train_batch_size,
    (samples and global batch do not)   evaluation.batch_size, training.dataloader_* (`SAID`): announced

Where the loss sorts a micro-batch (`runner.manifest.SORTING`), the per-device size defines the run, too.
The rest of `evaluation` defines, because "before" and "after" must mean the same. Commits of hub repositories
are kept, so that a branch that moves does not move a run; local files are compared by fingerprint.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from runner import __version__
from runner.checkpoint.files import refuse_newer
from runner.durable import disk
from runner.errors import DataError, JobError, Problem
from runner.manifest import Job

FREE = (
    "checkpoints.*",
    "datasets.num_proc",
    "training.logging_*",
    "training.log_*",
    "training.report_to*",
    "training.project",
    "training.run_name",
    "training.disable_tqdm",
    "resources.*",
    "kubernetes*",
    "aws_batch*",
    "gcp_batch*",
)
DURING = ("evaluation.steps", "evaluation.minutes", "evaluation.loss")
"""Evaluations during training: `FREE`, but `SAID` where the best of them is exported."""
PER_DEVICE = "training.per_device_train_batch_size"
SAID = (
    "launch.*",
    "speed.*",
    PER_DEVICE,
    "training.dataloader_*",
    "evaluation.batch_size",
)
"""Patterns over dotted keys. Dataloader settings belong here because upstream's own shuffling is not used."""

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")

_SHOWN = 12
"""Differences listed before the rest is counted."""


class Identity(BaseModel):
    """The content of `run.json`."""

    model_config = ConfigDict(frozen=True)

    job: dict[str, Any]
    """The job of the first attempt, whole."""
    pins: dict[str, str]
    """Commits of hub repositories, by `runner.supervisor.fetch.key`."""
    fingerprints: dict[str, str]
    """Of local paths, by `runner.supervisor.fetch.fingerprint`."""
    versions: dict[str, str]
    """Packages of the first attempt, for the record and for one warning."""
    id: str = ""
    """Drawn when the run began; empty in a run that began with a version that drew none."""

    @property
    def run_id(self) -> str:
        """Names the run to the world outside: no other run has it, and every attempt of this one does."""
        return self.id or hashlib.sha256(encode(self)).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions of what decides the bits; read from the installation, nothing is imported."""
    found = {"vlm-runner": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def encode(identity: Identity) -> bytes:
    """The content of `run.json`."""
    document = {"format": 1, **identity.model_dump(mode="json")}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def decode(data: bytes, place: str) -> Identity:
    """The identity of a run.

    Args:
        place: where it was read, for messages.

    Raises:
        DataError: `run.json` cannot be understood.
        JobError: it is of a newer format.
    """
    try:
        document = json.loads(data)
        refuse_newer(document, place)
        return Identity.model_validate(document)
    except (ValueError, ValidationError) as error:
        remedy = "remedy: put it back from a copy, or remove the whole run to start over"
        raise DataError(f"{place}: cannot be read as the identity of a run; {remedy}") from error


def read(path: Path) -> Identity | None:
    """The copy on this machine; None if there is none yet."""
    with disk("read the run's identity", path):
        return decode(path.read_bytes(), str(path)) if path.exists() else None


@dataclass(frozen=True)
class Place:
    """Where a run is kept, for messages."""

    store: str
    """Address."""
    folder: Path

    @property
    def remedy(self) -> str:
        """How to begin anew where another run is."""
        if Path(self.store).is_relative_to(self.folder):
            return f"remove {self.folder} and all that it trained"
        return f"remove it (runner checkpoints rm {self.store}, and {self.folder})"


def check_job(stored: Identity, job: Job, place: Place, sections: Iterable[str] = ("*",)) -> list[str]:
    """Compare a job with the one that the run began with.

    Args:
        sections: patterns of the dotted keys to compare; all by default.

    Returns:
        What changed and may, where it is worth a line.

    Raises:
        JobError: another job; the differences and the remedy.
    """
    try:
        # Through the models, so that keys that came later have their defaults.
        old = flat(Job.model_validate(stored.job).model_dump(mode="json"))
    except ValidationError as error:
        reason = f"{place.store} belongs to a job that this version of the runner does not accept any more"
        raise JobError([Problem("name", reason, _remedy(job, place))]) from error
    new = flat(job.model_dump(mode="json"))
    chosen = job.evaluation is not None and job.evaluation.metric_for_best_model is not None
    free = FREE if chosen else (*FREE, *DURING)
    changed = [
        name
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ABSENT) != new.get(name, ABSENT) and not _matches(name, free)
    ]
    shown = {
        name: f"{name}: {_say(old.get(name, ABSENT))} -> {_say(new.get(name, ABSENT))}" for name in changed
    }
    said = [name for name in (*SAID, *DURING) if not (name == PER_DEVICE and job.training.sorts)]
    defining = [name for name in changed if not _matches(name, said) and _matches(name, sections)]
    if defining:
        lines = [shown[name] for name in defining[:_SHOWN]]
        if len(defining) > _SHOWN:
            lines.append(f"and {len(defining) - _SHOWN} more")
        reason = f"{place.store} belongs to another job of this name:\n      " + "\n      ".join(lines)
        raise JobError([Problem("name", reason, _remedy(job, place))])
    return [f"changed since the run began: {shown[name]}" for name in changed if _matches(name, said)]


def check_sources(stored: Identity, fingerprints: Mapping[str, str], job: Job, place: Place) -> None:
    """Compare local files with what the run began with.

    Raises:
        JobError: something else is there now.
    """
    other = sorted(
        path for path, value in fingerprints.items() if stored.fingerprints.get(path, value) != value
    )
    if other:
        reason = f"{place.store} began with other content in {', '.join(other)}"
        raise JobError([Problem("name", reason, f"put it back, or {_remedy(job, place)}")])


def changed_versions(stored: Identity, now: Mapping[str, str]) -> str | None:
    """One line on packages that are not those of the first attempt; None if all are."""
    then = stored.versions
    names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if not names:
        return None
    changes = ", ".join(f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}" for name in names)
    return f"other versions than when the run began ({changes}); the bits of the result may differ"


class _Absent:
    """A key that a job does not have, which is not the same as null."""


ABSENT = _Absent()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys, `datasets.train[0].split`."""
    if isinstance(tree, dict) and tree:
        return {
            name: value
            for key, child in tree.items()
            for name, value in flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(tree, list) and tree:
        return {
            name: value
            for index, child in enumerate(tree)
            for name, value in flat(child, f"{prefix}[{index}]").items()
        }
    return {prefix: tree}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _say(value: Any) -> str:
    return "absent" if isinstance(value, _Absent) else json.dumps(value, ensure_ascii=False)


def _remedy(job: Job, place: Place) -> str:
    return f"give this job another name than {job.name!r}, or {place.remedy}"
