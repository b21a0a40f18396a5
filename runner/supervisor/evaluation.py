"""`runner evaluate`: generate on a job's held-out rows with one adapter, or with the base model alone.

    --adapter            what is evaluated              runs/<name>/evaluation/
    (none)               the run's own adapter          adapter.json, adapter.predictions.jsonl
    (none), no adapter   the base model                 base.json, ...
    base                 the base model                 base.json, ...
    DIR                  the adapter in DIR             <label of DIR>.json, ...

The trainer writes into a folder of this evaluation (`evaluation/attempts/<n>/`); what it finished is moved
to its label by rename, so that a label is whole or what it was before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import request
from runner.checkpoint.place import run_place
from runner.durable import disk, write_json
from runner.errors import DataError, JobError, Preempted, Problem, RunnerError
from runner.events import Event
from runner.health import Heart
from runner.manifest import Job
from runner.plan import Plan, geometry
from runner.settings import Resolved
from runner.supervisor import attempt, fetch, identity
from runner.supervisor.attempt import TRAINER
from runner.supervisor.display import Voice, display
from runner.supervisor.fetching import fetched
from runner.supervisor.journal import cleaned
from runner.supervisor.notices import Notices
from runner.supervisor.progress import metric_lines, near
from runner.supervisor.run_folder import RunFolder
from runner.supervisor.seen import Seen
from runner.supervisor.verdict import final_error
from runner.supervisor.world import Machine

BASE = "base"
OWN = "adapter"
WHOLE = "model"
"""What a run without LoRA leaves."""
IMAGES = "images.zip"
"""Of `runner.train.evaluation.thumbnails`; the images of all labels are in one."""
_TAKEN = {BASE, OWN, WHOLE, "before", "after"}


def evaluate(
    resolved: Resolved,
    runs_dir: Path,
    adapter: str | Path | None = None,
    *,
    voice: Voice = "lines",
    trainer: Sequence[str] = TRAINER,
) -> int:
    """Evaluate, keep every prediction, print the metrics. Returns 0.

    Args:
        adapter: a folder, `base`, or None for what the run trained.
        voice: who listens.

    Raises:
        JobError: the job has nothing to evaluate, or the run's adapter is of another model.
        DataError: the adapter is none.
        RunnerError: any other end, with its exit code.
    """
    job = resolved.job
    if job.evaluation is None or not job.datasets.eval:
        reason = "the job has no datasets.eval, or its evaluation is null"
        raise JobError([Problem("evaluation", reason, "add datasets.eval and an evaluation section")])
    cut = geometry(job)
    folder = RunFolder((runs_dir / job.name).absolute())
    path, label = choose(adapter, folder)
    whole = folder.path / WHOLE
    if adapter is None and job.lora is None and whole.is_dir():
        label = WHOLE
    with (
        folder.locked(),
        Heart(folder.path) as heart,
        Notices(beat=heart.beat) as notices,
        contextlib.closing(display(voice)) as screen,
    ):
        stored = identity.read(folder.identity)
        if stored is not None and path == folder.adapter:
            # Other rows and other limits are welcome here; another base model is not.
            place = identity.Place(run_place(job.checkpoints.uri, job.name, folder.path), folder.path)
            identity.check_job(stored, job, place, sections=("model.*",))
        base = f"the model in {near(whole)}" if label == WHOLE else "the base model"
        screen.line(f"evaluating {base if path is None else f'the adapter in {near(path)}'}")
        pins = {} if stored is None else stored.pins
        asked = fetch.Request(job=job, train=False, pins=pins)
        sources = fetched(asked, folder.fetch, notices, screen.show).fetched
        if label == WHOLE:
            sources = sources.model_copy(update={"model": str(whole)})
        number, own = attempt.new_folder(folder.evaluation / "attempts")
        plan = Plan(
            purpose="evaluate",
            job=job,
            run_dir=own,  # its evaluation/ is ours to move
            attempt=number,
            attempt_dir=own,
            geometry=cut,
            fetched=sources,
            adapter=path,
            reference=_reference(folder, path, job, stored),
            save_seconds=job.checkpoints.max_loss_seconds,
        )

        def show(event: Event) -> None:
            if event["event"] != "evaluation" or voice == "json":  # for people the end says it
                screen.show(cleaned(event))

        def ask_to_stop(reason: str) -> bool:
            request.write(own, request.Request("stop", reason))
            screen.line(f"{reason}: stopping")
            return False

        ended = attempt.run(
            plan,
            trainer=trainer,
            environ=os.environ,
            machine=Machine.here(os.environ),
            notices=notices,
            seen=Seen(),
            on_event=show,
            on_notice=ask_to_stop,
            on_tick=screen.tick,
        )
        screen.close()
        final = None if ended.outcome is None else final_error(ended.outcome)
        if final is not None:
            raise final
        if ended.outcome is None or ended.outcome.outcome != "done":
            if notices.first is not None:
                raise Preempted(f"{notices.first}: the evaluation is stopped; nothing is kept of it")
            raise RunnerError(f"evaluate {job.name}: {ended.message(number)}")
        kept = _keep(own / "evaluation", folder.evaluation, label, path, job)
        for line in metric_lines(kept["metrics"]):
            screen.loud(line)
        screen.line(f"every prediction: {near(folder.evaluation / label)}.predictions.jsonl")
    return 0


def choose(adapter: str | Path | None, folder: RunFolder) -> tuple[Path | None, str]:
    """The adapter folder, None for the base model, and the label of its files.

    Raises:
        DataError: no adapter is there.
    """
    if adapter is None:
        return (folder.adapter, OWN) if folder.adapter.is_dir() else (None, BASE)
    if str(adapter) == BASE:
        return None, BASE
    path = Path(adapter).expanduser().absolute()
    if not (path / "adapter_config.json").is_file():
        raise DataError(
            f"evaluate {adapter}: {path} has no adapter_config.json, so it is no PEFT adapter; remedy: name "
            f"the folder of one, or `{BASE}` for the base model"
        )
    if path == folder.adapter:
        return path, OWN
    # `adapter` is what every run calls its own; the run's name tells them apart.
    name = f"{path.parent.name}-{path.name}" if path.name == OWN else path.name
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "other"
    return path, f"other-{label}" if label in _TAKEN else label


def _reference(
    folder: RunFolder, adapter: Path | None, job: Job, stored: identity.Identity | None
) -> Path | None:
    """The predictions before training, if they hold for what is evaluated now: the run's own adapter, over
    the same model, on rows of the same sources."""
    path = folder.evaluation / "before.predictions.jsonl"
    if stored is None or adapter != folder.adapter or not path.is_file():
        return None
    now = job.model_dump(mode="json")
    same = all(stored.job[key] == now[key] for key in ("model", "quantization", "method"))
    return path if same and stored.job["datasets"]["eval"] == now["datasets"]["eval"] else None


def _keep(made: Path, kept: Path, label: str, adapter: Path | None, job: Job) -> dict[str, Any]:
    """Move what the trainer wrote to its label; predictions first, because the metrics speak of them."""
    name = BASE if adapter is None else OWN
    with disk("keep the evaluation", kept):
        document: dict[str, Any] = json.loads((made / f"{name}.json").read_bytes())
        join_images(made / IMAGES, kept / IMAGES)
        document |= {"adapter": None if adapter is None else str(adapter), "model": job.model.name_or_path}
        (made / f"{name}.predictions.jsonl").replace(kept / f"{label}.predictions.jsonl")
        write_json(kept / f"{label}.json", document)
    return document


def join_images(made: Path, kept: Path) -> None:
    """Add an archive to the one that is kept. Each image has its content's name."""
    if not made.exists():
        return
    if zipfile.is_zipfile(kept):
        with zipfile.ZipFile(kept) as old, zipfile.ZipFile(made, "a") as new:
            for name in sorted(set(old.namelist()) - set(new.namelist())):
                new.writestr(old.getinfo(name), old.read(name))
    made.replace(kept)
