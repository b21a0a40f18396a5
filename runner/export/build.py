"""The sequence of an export: everything in a folder beside its place, and one rename at the end.

    to/.to.<random>/fetch, order.json, outcome.json, export.log, plain.log    ours, and gone afterwards
                    made/    -> to

Who interrupts it leaves nothing. A process that ended badly leaves its log among the temporary files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint.files import move, sync_folders
from runner.durable import disk, sync, write_json, write_text
from runner.errors import DataError, JobError, Problem, RunnerError, UsageError
from runner.events import Event
from runner.export import room
from runner.export.card import Card, base_of, comparison, markdown
from runner.export.check import check
from runner.export.child import kept, run_child
from runner.export.order import Kind, Made, Order
from runner.export.public import public_job
from runner.export.source import Trained
from runner.supervisor import fetch, identity
from runner.supervisor.fetching import fetched
from runner.supervisor.notices import Notices
from runner.supervisor.remains import last_error, outcome
from runner.supervisor.verdict import final_error

EXPORTER = (sys.executable, "-m", "runner.train.export")


@dataclass(frozen=True)
class Wanted:
    """What the command line says beside the run."""

    to: Path
    """Absolute."""
    merged: bool
    dtype: str | None
    """Of a merged model; None: the job's."""
    compare: int
    license: str | None
    repo: str | None
    """Hub id that it will have, for its card."""


@dataclass(frozen=True)
class Exported:
    """What lies at its place now."""

    card: Card
    base: str
    """Folder of the base model on this machine."""


def refuse_occupied(to: Path) -> None:
    """
    Raises:
        UsageError: something is there.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"export: {to} is there already\n    remedy: name a new folder, or an empty one")


def build(
    trained: Trained,
    wanted: Wanted,
    work: Path,
    notices: Notices,
    show: Callable[[Event], None],
    say: Callable[[str], None],
) -> Exported:
    """Make the export, look at it in a fresh process, and put it in its place.

    Args:
        work: an empty folder beside that place.
        show: takes events.
        say: takes lines.

    Raises:
        UsageError, DataError, JobError, AccessDenied, StorageError: as each step does.
        Preempted: asked to stop; nothing is left.
        RunnerError: a process of it crashed.
    """
    job = trained.job
    kind = _kind(trained, wanted)
    dtype = (wanted.dtype if kind == "merged" else None) or job.model.dtype
    compare = wanted.compare if kind == "merged" else 0
    if compare and not job.datasets.eval:
        raise UsageError(
            "export: the job has no datasets.eval, so there is nothing to compare the merged model on\n"
            "    remedy: --compare 0 merges without a comparison"
        )
    found = _fetched(trained, compare > 0, work, notices, show)
    base = Path(found.fetched.model)
    refuse_quantized_base(kind, job.model.name_or_path, base)
    made_at = work / "made"
    weights = room.of_weights(base, dtype) if kind == "merged" else room.of_folders(trained.folder)
    room.check_room(wanted.to, weights + room.of_processor(base))
    order = Order(
        kind=kind,
        job=job,
        base=str(base),
        trained=trained.folder,
        dtype=dtype,
        compare=compare,
        evals=found.fetched.eval,
        recorded=trained.recorded,
        to=made_at,
    )
    made = _made(order, work, notices, show)
    card = Card(kind, trained, made, dtype, wanted.repo or wanted.to.name, wanted.license)
    _describe(card, made_at)
    show({"event": "phase", "phase": "loading it with plain transformers, in a fresh process"})
    check(card, order, work, notices)
    if made.compared is not None:
        say(comparison(made.compared, dtype))
    with disk("put the export in its place", wanted.to):
        for file in made_at.iterdir():
            file.chmod(0o644)  # safetensors lets nobody else read its files
            sync(file)
        sync_folders(made_at)
        if wanted.to.is_dir():
            wanted.to.rmdir()
        move(made_at, wanted.to)
    return Exported(card, str(base))


def _kind(trained: Trained, wanted: Wanted) -> Kind:
    if wanted.merged and trained.whole:
        raise UsageError(
            "export: this run trained the whole model, so there is no adapter to merge\n"
            "    remedy: leave --merged out: the model is exported as it is"
        )
    if trained.whole:
        return "model"
    return "merged" if wanted.merged else "adapter"


def refuse_quantized_base(kind: Kind, name: str, base: Path) -> None:
    """
    Raises:
        DataError: the base model itself is stored quantized, and there is none to merge into.
    """
    if kind != "merged":
        return
    with disk("read the base model", base / "config.json"):
        text = (base / "config.json").read_text(encoding="utf-8")
    try:
        quantized = json.loads(text).get("quantization_config") is not None
    except (ValueError, AttributeError) as error:
        raise DataError(f"export: {base / 'config.json'} is no configuration: {error}") from error
    if quantized:
        raise DataError(
            f"export --merged: {name} is stored quantized, so there is no unquantized base to merge into; "
            "remedy: export the adapter without --merged"
        )


def _fetched(
    trained: Trained, with_rows: bool, work: Path, notices: Notices, show: Callable[[Event], None]
) -> fetch.Answer:
    """The base model, as the run began with it, and the rows to compare on."""
    job = trained.job
    if not with_rows:
        job = job.model_copy(update={"datasets": job.datasets.model_copy(update={"eval": []})})
    found = fetched(
        fetch.Request(job=job, train=False, pins=trained.identity.pins), work / "fetch", notices, show
    )
    name = job.model.name_or_path
    then, now = trained.identity.fingerprints.get(name), found.fingerprints.get(name)
    if then is not None and now is not None and then != now:
        reason = f"{name} is not what the run began with, so the adapter belongs to another base"
        raise JobError([Problem("model.name_or_path", reason, "put the model back")])
    return found


def _made(order: Order, work: Path, notices: Notices, show: Callable[[Event], None]) -> Made:
    asked, answer, log = work / "order.json", work / "outcome.json", work / "export.log"
    with disk("write the order", work):
        write_text(asked, order.model_dump_json())
    exit = run_child([*EXPORTER, str(asked), str(answer)], log, notices, show)
    left = outcome(answer)
    error = None if left is None else final_error(left)
    if error is not None:
        raise error
    if left is None or left.outcome != "done":
        why = f"it ended with {exit}; its last line: {last_error(log)}" if left is None else str(left.error)
        raise RunnerError(f"export: {why}; log: {kept(log)}")
    return Made.model_validate(left.facts)


def _describe(card: Card, folder: Path) -> None:
    """Card, job and record; and the adapter's own configuration without this machine."""
    with disk("describe the export", folder):
        write_text(folder / "README.md", markdown(card))
        write_text(folder / "job.yaml", public_job(card.trained.job, os.environ))
        compared = card.made.compared
        write_json(
            folder / "export.json",
            {
                "format": 1,
                "kind": card.kind,
                "dtype": card.dtype,
                "step": card.trained.step,
                "end": card.trained.result is not None,
                "compared": None if compared is None else compared.model_dump(mode="json"),
                "metrics": card.made.metrics,
                "like_run": card.made.like_run,
                "versions": identity.versions(),
            },
        )
        config = folder / "adapter_config.json"
        if config.is_file():
            document = json.loads(config.read_bytes())
            base = base_of(card.trained)
            document["base_model_name_or_path"] = base.place
            document["revision"] = base.revision or document.get("revision")
            write_json(config, document)
