"""What a person reads first of a run: what was resolved, from where, and where it runs.

    demo-sft: sft of demo:smolvlm-tiny
    job          jobs/demo-sft.yaml
                 command line: training.max_steps=20
    base         4-bit nf4, computes in float32; frozen: vision_tower, projector
    adapter      LoRA r=16, alpha 32, on all-linear
    data         demo:charts[train] as vqa, 32 rows a step
    evaluation   demo:charts[test], 40 rows, before and after
    machine      2 CPU cores, no GPU; 1 process (single)
    checkpoints  runs/demo-sft/checkpoints; a lost machine costs at most 2m

What is only found out later, as the rows at once that fit, is said when it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.checkpoint.place import run_place
from runner.job.yaml_source import show_path
from runner.manifest import Evaluation, Job, Source
from runner.settings import Resolved, leaves
from runner.supervisor.progress import near
from runner.supervisor.world import Machine, Placement

_LEFT = 12
"""Columns of the first word."""

_SHOWN = 6
"""Overridden values that are named."""


def opening(
    resolved: Resolved,
    run: Path,
    machine: Machine,
    placement: Placement,
    drivers: Path = Path("/proc/driver/nvidia/gpus"),
) -> list[str]:
    """The lines.

    Args:
        run: `runs/<name>`.
        drivers: where NVIDIA's driver says what its GPUs are.
    """
    job = resolved.job
    said = {
        "job": _origin(resolved),
        "base": _base(job),
        "adapter": _adapter(job),
        "data": f"{_sources(job.datasets.train)}, {job.training.global_batch_size} rows a step",
        "evaluation": _evaluation(job),
        "machine": f"{_machine(machine, drivers)}; {_processes(job, placement)}",
        "checkpoints": _checkpoints(job, run),
    }
    return [
        f"{job.name}: {job.method} of {job.model.name_or_path}",
        *(f"{word:<{_LEFT}} {what}" for word, what in said.items()),
    ]


def _origin(resolved: Resolved) -> str:
    """The file, and what is not as it says."""
    values = {show_path(path): path for path in leaves(resolved.job.model_dump(mode="json"))}
    tree = resolved.job.model_dump(mode="json")
    changed: dict[str, list[str]] = {}
    for key, source in resolved.sources.items():
        if source.startswith(("command line", "environment")):
            value: Any = tree
            for part in values[key]:
                value = value[part]
            changed.setdefault(source.partition(" JOB__")[0], []).append(f"{key}={value}")
    parts = [resolved.file or "no file"]
    for source, pairs in changed.items():
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        parts.append(f"{source}: {' '.join(pairs[:_SHOWN])}{more}")
    return f"\n{'':<{_LEFT}} ".join(parts)


def _base(job: Job) -> str:
    quantization = job.quantization or {}
    if quantization.get("load_in_4bit"):
        weights = f"4-bit {quantization.get('bnb_4bit_quant_type', 'fp4')}, computes in {job.model.dtype}"
    elif quantization.get("load_in_8bit"):
        weights = f"8-bit, computes in {job.model.dtype}"
    else:
        weights = f"{job.model.dtype}, not quantized"
    return f"{weights}; frozen: {', '.join(job.model.freeze) or 'nothing'}"


def _adapter(job: Job) -> str:
    """Defaults are PEFT's."""
    if job.lora is None:
        return "none: full fine-tuning"
    rank, alpha = job.lora.get("r", 8), job.lora.get("lora_alpha", 8)
    modules = job.lora.get("target_modules", "all-linear")
    where = modules if isinstance(modules, str) else ", ".join(map(str, modules))
    start = f", from {job.lora['init_from']}" if job.lora.get("init_from") else ""
    return f"LoRA r={rank}, alpha {alpha}, on {where}{start}"


def _sources(sources: list[Source]) -> str:
    return " + ".join(f"{one.path}[{one.split}] as {one.format}" for one in sources)


def _evaluation(job: Job) -> str:
    if job.evaluation is None or not job.datasets.eval:
        return "none"
    most = "all rows" if job.evaluation.max_samples is None else f"at most {job.evaluation.max_samples} rows"
    when = "before and after" if job.evaluation.baseline else "after"
    return f"{_sources(job.datasets.eval)}, {most}, {when}{_during(job.evaluation)}"


def _during(spec: Evaluation) -> str:
    """What is evaluated on the way, and what that decides."""
    if not spec.during:
        return ""
    often = f"{spec.steps} steps" if spec.minutes is None else f"{spec.minutes:g} minutes"
    metric = spec.metric_for_best_model
    best = "" if metric is None else f"; the best by {metric.replace('_', ' ')} is exported"
    patience = spec.early_stopping_patience
    stops = "" if patience is None else f", and {patience} without a better one end training"
    return f", and every {often}{best}{stops}"


def _machine(machine: Machine, drivers: Path) -> str:
    cores = f"{machine.cores} CPU core{'' if machine.cores == 1 else 's'}"
    if not machine.gpus:
        return f"{cores}, no GPU"
    names = set(_gpus(drivers))
    kind = names.pop() if len(names) == 1 else "GPU"
    return f"{machine.gpus} x {kind}, {cores}"


def _gpus(drivers: Path) -> Iterator[str]:
    """Names of the GPUs, where the driver says them: on Linux, outside of some containers."""
    for file in drivers.glob("*/information"):
        try:
            lines = file.read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        yield from (line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))


def _processes(job: Job, placement: Placement) -> str:
    """Before other nodes have said what they offer, as many as this one could give."""
    count = f"{placement.world} process{'' if placement.world == 1 else 'es'} ({placement.strategy})"
    return count if job.launch.nodes == 1 else f"{job.launch.nodes} nodes, {count}"


def _checkpoints(job: Job, run: Path) -> str:
    place = run_place(job.checkpoints.uri, job.name, run)
    shown = place if "://" in place else near(Path(place))
    return f"{shown}; a lost machine costs at most {job.checkpoints.max_loss}"
