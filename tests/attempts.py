"""Starts real trainer processes from plans, as the supervisor does, and reads what they leave.

A trainer is forked from a process that has imported the libraries already: importing takes longer than most
of these attempts. Processes that the supervisor starts itself are in tests/test_launch.py and test_resume.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets

from runner.demo import resolve_dataset, resolve_model
from runner.manifest import Job
from runner.plan import Fetched, Plan, Strategy, geometry

ROOT = Path(__file__).parents[1]

ZERO: tuple[Strategy, ...] = ("zero1", "zero2", "zero3")
"""DeepSpeed's, which finds no accelerator and has to be told that it runs on CPUs."""

JOB: dict[str, Any] = {
    "name": "test",
    "method": "sft",
    "seed": 3,
    "model": {"name_or_path": "demo:smolvlm-tiny", "dtype": "float32"},
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "datasets": {
        "train": [
            {
                "path": "demo:charts",
                "split": "train[:16]",
                "format": "vqa",
                "columns": {"question": "query", "answer": "label"},
            }
        ]
    },
    "training": {
        "global_batch_size": 8,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
    },
}
"""Sixteen charts, two epochs, four steps."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested mappings with `changes` laid over; other values replace."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def charts() -> Path:
    """The demo's charts, built once a session."""
    return resolve_dataset("demo:charts", Path(os.environ["RUNNER_CACHE"]))


def pairs(folder: Path) -> Path:
    """A file of preference pairs in RLAIF-V's columns: the charts' own answers, preferred to longer ones."""
    file = folder / "pairs.parquet"
    if not file.exists():
        table = datasets.load_dataset(
            "parquet", data_files=str(next(charts().glob("data/train*"))), split="train[:24]"
        )
        table = table.cast_column("image", datasets.Image(decode=False))
        datasets.Dataset.from_dict(
            {
                "image": table["image"][:],
                "question": table["query"][:],
                "chosen": [labels[0] for labels in table["label"]],
                "rejected": [f"I think {labels[0]} or so" for labels in table["label"]],
            }
        ).cast_column("image", datasets.Image()).to_parquet(file)
    return file


def planned(folder: Path, changes: dict[str, Any], **fields: Any) -> Plan:
    """The plan of one attempt, and its folder. `folder` becomes `runs/<name>`.

    `changes` are laid over `JOB`, `fields` over the plan; `data` lies where the datasets are, else
    the charts do.
    """
    job = Job.model_validate(merged(JOB, changes))
    attempt = fields.pop("attempt", 1)
    data = str(fields.pop("data", None) or charts())
    attempt_dir = folder / "attempts" / str(attempt)
    attempt_dir.mkdir(parents=True)
    (folder / "outbox").mkdir(exist_ok=True)
    return Plan(
        purpose=fields.pop("purpose", "train"),
        job=job,
        run_dir=folder,
        attempt=attempt,
        attempt_dir=attempt_dir,
        geometry=geometry(job),
        probe=job.training.per_device_train_batch_size == "auto",
        fetched=Fetched(
            model=str(resolve_model("demo:smolvlm-tiny")),
            train=[data] * len(job.datasets.train),
            eval=[data] * len(job.datasets.eval),
            init_from=fields.pop("init_from", None),
        ),
        save_seconds=3600,
        **fields,
    )


Event = dict[str, Any]


def run(
    folder: Path,
    changes: dict[str, Any],
    trainer: Sequence[str] | None = None,
    on_event: Callable[[Event], object] = lambda event: None,
    **fields: Any,
) -> tuple[dict[str, Any], list[Event]]:
    """One attempt in its own process, as `planned`: its outcome and its events.

    Args:
        trainer: a command of the test's own, that takes the path of the plan.
        on_event: takes each event when it comes, as the supervisor would.
    """
    plan = planned(folder, changes, **fields)
    attempt_dir = plan.attempt_dir
    file = attempt_dir / "plan.json"
    file.write_text(plan.model_dump_json())
    log = attempt_dir / "trainer.log"
    if trainer is None:
        events = _forked(file, log, on_event)
    else:
        events = _started([*trainer, str(file)], log, on_event)
    outcome_file = attempt_dir / "outcome.json"
    assert outcome_file.exists(), (attempt_dir / "trainer.log").read_text()[-3000:]
    return json.loads(outcome_file.read_text()), events


def run_ranks(
    folder: Path,
    changes: dict[str, Any],
    strategy: Strategy,
    world: int,
    on_event: Callable[[Event], object] = lambda event: None,
    **fields: Any,
) -> tuple[dict[str, Any], list[Event]]:
    """One attempt in `world` processes under a strategy, as the supervisor starts them: the outcome and the
    events of rank 0. The first that ends badly ends the others.

    Args:
        on_event: takes each event when it comes, as the supervisor would.
    """
    plan = planned(folder, changes, **fields)
    cut = geometry(plan.job, world)
    plan = plan.model_copy(update={"strategy": strategy, "geometry": cut, "probe": False})
    file = plan.attempt_dir / "plan.json"
    file.write_text(plan.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port)}
    if strategy in ZERO:
        shared |= {"DS_ACCELERATOR": "cpu"}
    reader, writer = FORKS.Pipe(duplex=False)
    processes = []
    for rank in range(world):
        mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        log = plan.attempt_dir / ("trainer.log" if rank == 0 else f"trainer-{rank}.log")
        given = (file, log, {**os.environ, **mine}, writer if rank == 0 else None)
        processes.append(FORKS.Process(target=_trainer, args=given))
        processes[-1].start()
    writer.close()
    threading.Thread(target=_end_together, args=(processes,), daemon=True).start()
    with os.fdopen(os.dup(reader.fileno())) as lines:
        events = _heard(lines, on_event)
    reader.close()
    for process in processes:
        process.join()
    outcomes = sorted(plan.attempt_dir.glob("outcome*.json"), key=lambda path: path.stat().st_mtime_ns)
    logs = "\n".join(path.read_text()[-3000:] for path in plan.attempt_dir.glob("trainer*.log"))
    assert outcomes, logs
    first = json.loads(outcomes[0].read_text())
    if first["outcome"] in ("done", "preempted"):
        first = json.loads((plan.attempt_dir / "outcome.json").read_text())
    return first, events


def _end_together(processes: list[Any]) -> None:
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0, 75) for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.05)


def _heard(lines: Iterable[str], on_event: Callable[[Event], object]) -> list[Event]:
    events = []
    for line in lines:
        events.append(json.loads(line))
        on_event(events[-1])
    return events


def _started(command: list[str], log: Path, on_event: Callable[[Event], object]) -> list[Event]:
    reader, writer = os.pipe()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RUNNER_EVENTS_FD": str(writer)},
            pass_fds=[writer],
            stdout=output,
            stderr=output,
        )
    os.close(writer)
    with os.fdopen(reader) as lines:
        events = _heard(lines, on_event)
    process.wait()
    return events


LIBRARIES = ["runner.train.run", *([] if Path("/dev/nvidiactl").exists() else ["deepspeed"])]
"""What is imported before a fork. accelerate imports DeepSpeed in every process, to ask whether a model is of
it; where there is a GPU that would reach for it too early."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*LIBRARIES, __name__])


def _forked(plan: Path, log: Path, on_event: Callable[[Event], object]) -> list[Event]:
    reader, writer = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_trainer, args=(plan, log, dict(os.environ), writer))
    process.start()
    writer.close()
    with os.fdopen(os.dup(reader.fileno())) as lines:
        events = _heard(lines, on_event)
    reader.close()
    process.join()
    return events


def start_as_a_program() -> None:
    """In the forked process: the workers of its data loader start as a program's do, not as it did."""
    multiprocessing.set_start_method(None, force=True)


def _trainer(plan: Path, log: Path, environment: dict[str, str], events: Connection | None) -> None:
    """In the forked process: what `python -m runner.train PLAN` does."""
    from runner.train.__main__ import main

    start_as_a_program()
    os.environ.clear()
    os.environ.update(environment)
    if events is not None:
        os.environ["RUNNER_EVENTS_FD"] = str(os.dup(events.fileno()))
        events.close()
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    sys.exit(main(plan))


def steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step events, in order."""
    return [event for event in events if event["event"] == "step"]
