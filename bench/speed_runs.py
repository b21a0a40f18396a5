"""Runs the variants of the speed bench, each in a process of its own, in turn, while time is left.

What the headline needs comes first: all levers and plain TRL of every case, then frozen parts alone, then the
levers one by one; rounds after the first repeat the headline. A process that is at work when time ends is
ended.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attempt import Failed, trainer
from speed_cases import ALL, PLAIN, Case, Variant, job, spec
from speed_flops import Sample
from speed_models import Model

END = 10
"""Seconds kept for the end of the program."""
NO_TIME = "not run: no time was left"


@dataclass(frozen=True)
class Bench:
    """One command: what is trained, where, and until when."""

    model: Model
    device: str
    folder: Path
    """Of the model (`model/`), the rows and the runs."""
    deadline: float
    """By `time.monotonic`."""

    @property
    def left(self) -> float:
        """Seconds for training."""
        return self.deadline - END - time.monotonic()


@dataclass
class Runs:
    """What was measured of a case, while it is measured."""

    case: Case
    steps: int
    data: Path
    sample: Sample
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By variant."""
    why: dict[str, str] = field(default_factory=dict)
    """Why a variant was not run, by variant."""
    failed: list[str] = field(default_factory=list)
    """What should have been possible."""
    longest: float = 0.0
    """Seconds of its slowest process."""
    order: list[list[int]] | None = None
    """Rows of each step."""
    card: str | None = None


def variants(case: Case, device: str, only: list[str] | None = None) -> dict[str, Variant | None]:
    """A case's variants by name, in the order in which they run: one of ours, whose rows plain TRL then takes
    (it is None), and the others.

    Args:
        only: those names; None: all.
    """
    ours = {one.name: one for one in case.variants(device) if only is None or one.name in only}
    first = list(ours)[:1]
    names = [*first, *[PLAIN] * (only is None or PLAIN in only), *list(ours)[1:]]
    return {name: ours.get(name) for name in names}


def measure(bench: Bench, all_runs: list[Runs], rounds: int, only: list[str] | None) -> None:
    """Fill the runs.

    Args:
        only: names of variants; None: all of them in the first round, the headline in the others.
    """
    for turn in range(rounds):
        wanted = only if only is not None or turn == 0 else [ALL, PLAIN]
        named = [list(variants(runs.case, bench.device, wanted).items()) for runs in all_runs]
        for rank in itertools.zip_longest(*named):
            for runs, found in zip(all_runs, rank, strict=True):
                if found is not None:
                    _once(bench, runs, *found, turn)


def _once(bench: Bench, runs: Runs, name: str, variant: Variant | None, turn: int) -> None:
    """Run one variant, or note why it was not."""
    if variant is not None and variant.missing:
        runs.why[name] = f"not run: {variant.package} is not installed"
        return
    if bench.left < runs.longest:
        runs.why.setdefault(name, NO_TIME)
        return
    print(f"{runs.case.name}: {name}, round {turn + 1}", flush=True)
    began = time.monotonic()
    try:
        found = _plain(bench, runs) if variant is None else _ours(bench, runs, variant, turn)
    except Failed as error:
        if bench.left <= 0:
            runs.why.setdefault(name, NO_TIME)
            return
        print(error, flush=True)
        reason = str(error).strip().splitlines()[-1].replace("|", "/")
        runs.why[name] = f"failed: {reason}"
        if variant is None or variant.package is None:  # upstream may refuse an option of its own
            runs.failed.append(f"{runs.case.name}, {name}: {reason}")
        return
    runs.longest = max(runs.longest, time.monotonic() - began)
    runs.card = found.pop("card")
    runs.rounds.setdefault(name, []).append(found)


def _ours(bench: Bench, runs: Runs, variant: Variant, turn: int) -> dict[str, Any]:
    """One round of one of our variants."""
    folder = bench.folder / f"{runs.case.name}-{variant.name.replace(' ', '-')}-{turn}"
    model = bench.folder / "model"
    asked = job(runs.case, variant, bench.model, runs.steps, model, runs.data)
    found = trainer(folder, asked, model, runs.data, bench.left)
    order = [step["ids"] for step in found.steps]
    runs.order = runs.order or order
    if order != runs.order:
        raise Failed("its steps took other rows than those of the first run")
    return {
        "losses": [step["loss"] for step in found.steps],
        "seconds": [step["seconds"] for step in found.steps],
        "data_seconds": [step.get("data_seconds") for step in found.steps],
        "before_seconds": found.before_seconds,
        **found.process,
    }


def _plain(bench: Bench, runs: Runs) -> dict[str, Any]:
    """One round of `bench/plain_trl.py`."""
    if runs.order is None:
        raise Failed("it needs the rows of each step from a run of ours, and there is none")
    file = bench.folder / "plain.json"
    model = bench.folder / "model"
    said = spec(runs.case, bench.model, runs.steps, model, runs.data, runs.order, bench.device)
    file.write_text(json.dumps(said))
    script = Path(__file__).with_name("plain_trl.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script), str(file)],
            capture_output=True,
            text=True,
            cwd=bench.folder,
            timeout=bench.left,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed("it took too long") from error
    if done.returncode != 0:
        raise Failed(f"plain TRL failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, **result.pop("process")}
