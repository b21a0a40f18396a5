"""The first thing that a report says: how the run ended, what came of it, and what to do. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.report.loose import text, whole
from runner.report.metrics import Change, Estimate, change, named
from runner.report.read import State

WORDS: dict[State, str] = {
    "done": "Done",
    "preempted": "Stopped, state saved",
    "failed": "Failed",
    "running": "Running",
    "interrupted": "Interrupted",
    "begun": "Not begun",
}

NEXT: dict[State, str] = {
    "done": "",
    "preempted": "The same command goes on from the last checkpoint.",
    "failed": "",
    "running": "This page shows the run as it was when it was made: runner report makes it again.",
    "interrupted": "Its supervisor ended without a word. The same command goes on from the last checkpoint.",
    "begun": "",
}


@dataclass(frozen=True)
class Verdict:
    """How a run ended."""

    state: State
    word: str
    sentence: str
    """What training made of the metric, or where the run stands."""
    change: Change
    error: str | None
    remedy: str | None
    next: str
    exit_code: int | None


def verdict(
    state: State,
    said: Mapping[str, Any],
    metric: str,
    before: Estimate | None,
    after: Estimate | None,
    step: int,
    steps: int | None,
) -> Verdict:
    """Judge a run.

    Args:
        said: its end: error and exit code.
        metric: that it is judged by.
        step: the last that was done.
        steps: of the whole run; None where nobody knows.
    """
    became = change(metric, before, after)
    error, remedy = split(text(said.get("error")))
    whole_way = "" if steps is None else f" of {steps:,}"
    sentence = _sentence(named(metric), became, before, after) or f"Step {step:,}{whole_way}."
    return Verdict(
        state=state,
        word=WORDS[state],
        sentence=sentence,
        change=became,
        error=error,
        remedy=remedy,
        next=NEXT[state],
        exit_code=whole(said.get("exit_code")),
    )


def split(error: str | None) -> tuple[str | None, str | None]:
    """What went wrong, and what to do.

    error                                     what                remedy
    disk is full; remedy: free space          disk is full        free space
    it does not fit. Remedy: a smaller batch  it does not fit     a smaller batch
    a Remedy, the largest lever first: b      a                   b
    killed                                    killed              -
    """
    if error is None:
        return None, None
    what, found, remedy = _remedy_of(error)
    return what.strip(" ;.,\n"), remedy.strip() if found else None


def _remedy_of(error: str) -> tuple[str, bool, str]:
    match = re.search(r"\bremedy(?:, [^:]*)?:", error, re.IGNORECASE)
    if match is None:
        return error, False, ""
    return error[: match.start()], True, error[match.end() :]


def _sentence(name: str, became: Change, before: Estimate | None, after: Estimate | None) -> str:
    if before is None or after is None:
        if after is not None:
            return f"{name.capitalize()} {after.value:.2f} after training; it was not measured before."
        return ""
    way = "rose" if after.value > before.value else "fell" if after.value < before.value else "stayed"
    numbers = f"from {before.value:.2f} to {after.value:.2f}" if way != "stayed" else f"at {after.value:.2f}"
    doubt = {
        "better": "a clear gain: the 95 % intervals do not overlap",
        "worse": "a clear loss: the 95 % intervals do not overlap",
        "unclear": "the 95 % intervals overlap, so this may be chance",
    }
    known = way != "stayed" and after.low is not None and before.low is not None
    told = f"; {doubt[became]}" if known and became in doubt else ""
    return f"{name.capitalize()} {way} {numbers}{told}."
