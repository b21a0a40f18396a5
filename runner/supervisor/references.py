"""Where this machine keeps what dpo's reference thinks of pairs: one file for everything that decides it.

The values of a pair depend on its text and images, which the file's entries are named by, and on the model,
its quantization, its processor and where the adapter starts, which the file is named by.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from runner.manifest import Job
from runner.plan import Fetched
from runner.supervisor.fetch import key
from runner.supervisor.identity import Identity, versions


def references_file(job: Job, sources: Fetched, identity: Identity, cache: Path) -> Path | None:
    """The file of a job's reference; None where none is kept.

    Args:
        cache: this machine's (`runner.supervisor.fetch.cache_folder`).
    """
    if job.method != "dpo" or not job.speed.cache_reference:
        return None
    lora = job.lora or {}
    # With neither, the reference is the base model, whatever trains over it.
    starts = {"init_from", "init_lora_weights"} & lora.keys()
    options = job.training.options

    model = job.model.name_or_path
    # Not `sources.revisions`, where a data set of the model's name would stand in its place.
    commit = identity.pins.get(key("model", model, job.model.revision))
    decides = {
        "format": 1,
        "model": job.model.model_dump(mode="json"),
        "commit": commit or identity.fingerprints.get(model),
        # A fingerprint does not see all of local weights, and a stale reference is an error that nobody sees.
        "written": None if commit else _written(Path(sources.model)),
        "quantization": job.quantization,
        "start": [lora, identity.fingerprints.get(lora.get("init_from", "")), job.seed] if starts else None,
        "full": job.lora is None,  # whose reference is in the precision that trains
        "precision": [options.get(name) for name in ("tf32", "ld_alpha")],
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return cache / "references" / f"{digest}.safetensors"


def _written(folder: Path) -> list[Any]:
    """Name, size and time in nanoseconds of every file: whatever was written again differs."""
    found = [(file, file.stat()) for file in sorted(folder.rglob("*")) if file.is_file()]
    return [[file.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns] for file, stat in found]
