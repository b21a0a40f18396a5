"""`metrics.prom`: where a run stands, in Prometheus' text format, for node_exporter's textfile collector.

Gauges say what is so now. Counters count what this command has done, from 0, as Prometheus expects of a
process that starts; steps that are done again are counted again. What is not known has no line.

Written by hand: the format is lines, and not worth a package in every installation. Tests read it with the
official one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.events import Event
from runner.manifest import Job
from runner.supervisor.progress import PHASES
from runner.tracking.rows import finite, flat

NAMES = ("start", *PHASES, "ended")
"""Values of the label `phase`."""

Labels = Mapping[str, str]


@dataclass
class Standing:
    """What the events of one command add up to."""

    info: Labels
    attempt: int = 0
    phase: str = "start"
    numbers: dict[str, float] = field(default_factory=dict)
    """By the name of their metric."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics by `when`: before, during (the newest), after."""
    restarts: Counter[str] = field(default_factory=Counter)

    def note(self, event: Event) -> None:
        """Take the next event."""
        numbers = self.numbers
        self.attempt = max(self.attempt, int(event.get("attempt") or 0))
        match event:
            case {"event": "step"}:
                told = finite({name: event.get(name) for name in _STEP})
                numbers.update({_STEP[name]: value for name, value in told.items()})
                counted = finite({"steps": 1, "tokens": event.get("tokens"), "images": event.get("images")})
                for name, count in counted.items():
                    total = f"vlm_runner_{name}_total"
                    numbers[total] = numbers.get(total, 0.0) + count
            case {"event": "plan", "steps": int(steps)}:
                numbers["vlm_runner_steps"] = steps
            case {"event": "phase", "phase": str(phase)}:
                self.phase = phase
            case {"event": "attempt", "step": int(step)}:
                numbers["vlm_runner_step"] = step
            case {"event": "restart", "after": str(after)}:
                self.restarts["out_of_memory" if event.get("per_device") else after] += 1
            case {"event": "commit", "step": int(step), "time": float(time)}:
                numbers |= {"vlm_runner_committed_step": step, "vlm_runner_commit_timestamp_seconds": time}
            case {"event": "evaluation", "when": str(when), "metrics": dict(metrics)}:
                self.evaluated(when, metrics)
            case {"event": "start", "time": float(time)}:
                numbers["vlm_runner_start_timestamp_seconds"] = time
            case {"event": "end", "exit_code": int(code)}:
                self.phase = "ended"
                numbers["vlm_runner_exit_code"] = code

    def evaluated(self, when: str, metrics: Mapping[str, Any] | None) -> None:
        """Take metrics, those of an earlier command too; loss and answers of one step come apart."""
        if metrics is not None:
            self.evaluations.setdefault(when, {}).update(finite(flat(metrics, "")))


def standing(job: Job) -> Standing:
    """A command that begins."""
    return Standing({"run": job.name, "method": job.method, "model": job.model.name_or_path})


def text(state: Standing) -> str:
    """The whole file."""
    run = {"run": state.info["run"]}
    lines = [*_metric("vlm_runner_run_info", [(state.info, 1.0)])]
    lines += _metric("vlm_runner_attempt", [(run, float(state.attempt))])
    phases = [({**run, "phase": one}, float(one == state.phase)) for one in NAMES]
    lines += _metric("vlm_runner_phase", phases)
    for name in _HELP:
        if name in state.numbers:
            lines += _metric(name, [(run, state.numbers[name])])
    restarts = [({**run, "reason": reason}, float(count)) for reason, count in sorted(state.restarts.items())]
    lines += _metric("vlm_runner_restarts_total", restarts)
    evaluations = [
        ({**run, "when": when, "metric": name}, value)
        for when, metrics in state.evaluations.items()
        for name, value in metrics.items()
    ]
    lines += _metric("vlm_runner_evaluation", evaluations)
    return "".join(f"{line}\n" for line in lines)


_STEP = {
    "step": "vlm_runner_step",
    "steps": "vlm_runner_steps",
    "loss": "vlm_runner_loss",
    "grad_norm": "vlm_runner_gradient_norm",
    "learning_rate": "vlm_runner_learning_rate",
    "seconds": "vlm_runner_step_seconds",
    "memory_bytes": "vlm_runner_memory_peak_bytes",
}
"""Fields of a step's event that are gauges."""

_HELP = {
    "vlm_runner_run_info": "What runs here; always 1.",
    "vlm_runner_attempt": "Number of the newest attempt of the run; 0 before the first of this command.",
    "vlm_runner_phase": "1 for what the run is doing, 0 for everything else.",
    "vlm_runner_step": "Optimizer steps that are done.",
    "vlm_runner_steps": "Optimizer steps of the whole run.",
    "vlm_runner_steps_total": "Optimizer steps of this command, those done again included.",
    "vlm_runner_loss": "Training loss of the newest step.",
    "vlm_runner_gradient_norm": "Gradient norm of the newest step, before clipping.",
    "vlm_runner_learning_rate": "Learning rate of the newest step.",
    "vlm_runner_step_seconds": "Seconds that the newest step took.",
    "vlm_runner_memory_peak_bytes": "Most memory of the device so far.",
    "vlm_runner_tokens_total": "Tokens of this command's steps, without padding.",
    "vlm_runner_images_total": "Images of this command's steps.",
    "vlm_runner_committed_step": "Step of the newest checkpoint that is committed.",
    "vlm_runner_commit_timestamp_seconds": "When it was committed.",
    "vlm_runner_start_timestamp_seconds": "When this command took the run.",
    "vlm_runner_restarts_total": "Restarts of this command: after trainer (a crash) or out_of_memory, or why "
    "another command had stopped: notice, lost, failure.",
    "vlm_runner_evaluation": "Metrics before, during (the newest) and after training.",
    "vlm_runner_exit_code": "Exit code of the command; absent while it runs.",
}


def _metric(name: str, samples: Sequence[tuple[Labels, float]]) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP {name} {_HELP[name]}"
    yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
    for labels, value in samples:
        said = ",".join(f'{label}="{_escaped(one)}"' for label, one in labels.items())
        yield f"{name}{{{said}}} {_number(value)}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == math.trunc(value) and abs(value) < 2**53 else repr(value)
