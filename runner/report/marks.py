"""What interrupted or changed a run, as marks on its curves. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runner.report.loose import mapping, text, whole

Kind = Literal["preemption", "restart", "batch", "change", "damage", "best", "early"]

WORDS: dict[Kind, str] = {
    "preemption": "Preempted",
    "restart": "Restarted",
    "batch": "Batch changed",
    "change": "Strategy changed",
    "damage": "Damaged",
    "best": "Best step",
    "early": "Stopped early",
}

RESTARTS: tuple[Kind, ...] = ("preemption", "restart", "batch")
"""Marks of a new attempt."""


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run."""

    step: int
    """Where on the curves: the step that training went on from."""
    kind: Kind
    title: str
    """A few words."""
    text: str
    """The whole reason; may be empty."""
    attempt: int | None = None


def kind_of(after: str | None, reason: str, per_device: bool) -> Kind:
    """What a restart is a mark of.

    after     reason begins with   per_device   kind
    any       any                  yes          batch        memory made it go on with smaller micro-batches
    notice    any                  no           preemption
    lost      any                  no           preemption   the machine went without a word
    trainer   any                  no           restart
    failure   any                  no           restart
    unknown   preempted:           no           preemption   result.json does not say after what
    unknown   killed together      no           preemption
    unknown   anything else        no           restart
    """
    if per_device:
        return "batch"
    if after in ("notice", "lost"):
        return "preemption"
    if after is None and reason.startswith(("preempted:", "killed together")):
        return "preemption"
    return "restart"


def of_restart(said: Mapping[str, Any], attempt: int, reached: int) -> Mark:
    """The mark of a restart.

    Args:
        said: a `restart` event, or one of `restarts` in result.json.
        reached: the last step before it, 0 if nobody knows.
    """
    step, reason = whole(said.get("step")) or 0, text(said.get("reason")) or "no reason is known"
    sizes = mapping(said.get("per_device"))
    kind = kind_of(text(said.get("after")), reason, bool(sizes))
    if kind == "batch":
        title = f"{sizes.get('from')} → {sizes.get('to')} rows a device"
    else:
        title = f"attempt {attempt} goes on from here"
    told = (
        reason.removeprefix("preempted: ").removeprefix("failed: ").removesuffix("; the same command goes on")
    )
    again = f"; steps {step + 1} to {reached} were done again" if reached > step else ""
    return Mark(step, kind, title, f"{told}{again}", attempt)


def of_fidelity(changes: Iterable[str], attempt: int, step: int) -> list[Mark]:
    """Marks of what a resume cuts in another way; the micro-batch has its own, of the restart.

    changes                                     marks
    world 4 -> 2                                world 4 → 2
    strategy ddp -> zero2                       strategy ddp → zero2
    per_device 8 -> 4                           -
    the checkpoint does not say how its ...     -
    """
    told = [change for change in changes if change.startswith(("world ", "strategy "))]
    return [Mark(step, "change", change.replace("->", "→"), "", attempt) for change in told]


def merged(told: Sequence[Mark], restarts: Sequence[Any]) -> tuple[Mark, ...]:
    """The marks of the events of this machine, and those of restarts that only result.json knows."""
    known = {mark.attempt for mark in told if mark.kind in RESTARTS}
    others = [
        of_restart(one, attempt, 0)
        for one in map(mapping, restarts)
        if (attempt := whole(one.get("attempt"))) is not None and attempt not in known
    ]
    return tuple(sorted([*others, *told], key=lambda mark: (mark.attempt or 0, mark.step)))
