"""Where a run stands, from what its store holds. Pure: no store, no clock.

    HEAD           owner, checkpoints, what the run has cost; renewed every 15 s while somebody owns it
    events/        what happened, in parts that are sent with every commit and at the end

Ages are by the store's own clock, so that those of two machines need not agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from runner.checkpoint.head import Head
from runner.events import Event
from runner.supervisor.result import Record

State = Literal[
    "starting", "running", "waiting", "ending", "lost", "preempted", "failed", "released", "done", "removing"
]

QUIET = frozenset({"phase", "probe", "plan", "audit", "begin", "step", "progress", "checkpoint", "message"})
"""Events that say how it goes, and not what happened."""

EVENTS = 8
"""That are shown, the newest."""

_FLAT = 0.02
"""Share of the loss below which a difference is none."""


@dataclass(frozen=True)
class Loss:
    """The loss of the newest steps."""

    last: float
    before: float | None
    """Mean of the older half of what is kept; None of too few."""
    recent: float | None
    """Mean of the newer half."""
    steps: int
    """That the means are over, together."""

    @property
    def trend(self) -> Literal["falling", "flat", "rising"] | None:
        """None: too few steps."""
        if self.before is None or self.recent is None:
            return None
        change = self.recent - self.before
        if abs(change) <= _FLAT * abs(self.before):
            return "flat"
        return "falling" if change < 0 else "rising"


@dataclass(frozen=True)
class Standing:
    """A run as its store has it. None is unknown."""

    state: State
    phase: str | None
    owner: Mapping[str, Any]
    epoch: int
    lease_age: float | None
    """Seconds since the owner last renewed, or anybody last changed `HEAD`."""
    step: int | None
    steps: int | None
    loss: Loss | None
    eta: float | None
    """Seconds of training that are left, without evaluations and waits."""
    checkpoint: str | None
    checkpoint_step: int | None
    checkpoint_age: float | None
    at_risk: float | None
    """Seconds of steps that no committed checkpoint has, when the lease was renewed."""
    attempts: int | None
    noticed: int | None
    lost: int | None
    restarts: tuple[Mapping[str, Any], ...]
    seconds: float | None
    metrics: Mapping[str, Any] | None
    """`before` and `after`, each null until it is known."""
    error: str | None
    """Why it ended, if it did."""
    exit_code: int | None
    events: tuple[Event, ...]

    @property
    def preemptions(self) -> int | None:
        """Ends of a command, by a notice or with its machine, that the run went on after."""
        return None if self.noticed is None or self.lost is None else self.noticed + self.lost


def state_of(head: Head, age: float | None, record: Record | None) -> State:
    """What a run is doing.

    HEAD       renewed           record, of this owner        state
    done       -                 -                            done
    removing   -                 -                            removing
    released   -                 its end: preempted           preempted: the same command goes on
    released   -                 its end: anything else       failed
    released   -                 no end                       released: adopted, or cleaned
    held       longer than ttl   -                            lost: no word of its owner
    held       lately            phase wait                   waiting: for the store
    held       lately            a phase of its trainer       running
    held       lately            its end                      ending: sends what is left
    held       lately            none yet, or no trainer      starting: fetches, restores, waits for nodes
    """
    if head.state in ("done", "removing"):
        return "done" if head.state == "done" else "removing"
    if head.state == "released":
        last = {} if record is None or record.last is None else record.last
        if last.get("event") != "end":
            return "released"
        return "preempted" if last.get("outcome") == "preempted" else "failed"
    if age is not None and age > head.ttl_s:
        return "lost"
    if record is None or record.now.epoch != head.epoch or record.now.phase == "start":
        return "starting"
    if record.now.phase is None:
        return "ending"
    return "waiting" if record.now.phase == "wait" else "running"


def standing(
    head: Head, age: float | None, checkpoint_age: float | None, events: Iterable[Event]
) -> Standing:
    """Everything that is known.

    Args:
        age: seconds since `HEAD` was written.
        checkpoint_age: the same of the newest checkpoint's manifest.
        events: the newest parts, oldest first.
    """
    record = _record(head)
    state = state_of(head, age, record)
    now, newest = (None if record is None else record.now), head.newest
    if now is not None and newest is not None:
        # The write of `HEAD` that commits it carries a record of the moment before.
        now = now.after({"event": "commit", "id": newest.id})
    known = now is not None and now.steps is not None
    last = {} if record is None or record.last is None or state == "starting" else record.last
    alive = state in ("starting", "running", "waiting", "ending")
    step = now.step if now is not None and known else None
    if now is not None and not alive:  # what was not committed is gone
        step = None if newest is None else newest.step
    if head.final is not None:
        step = head.final.step
    eta = None
    if now is not None and now.steps is not None and now.step_seconds is not None and state == "running":
        eta = now.step_seconds * max(0, now.steps - now.step)
    ended = last.get("event") == "end" and not alive
    return Standing(
        state=state,
        phase=None if now is None or not alive else now.phase,
        owner=head.owner.model_dump(mode="json", include={"attempt", "host", "job"}),
        epoch=head.epoch,
        lease_age=age,
        step=step,
        steps=None if now is None else now.steps,
        loss=None if now is None else _loss(now.losses),
        eta=eta,
        checkpoint=None if newest is None else newest.id,
        checkpoint_step=None if newest is None else newest.step,
        checkpoint_age=checkpoint_age,
        at_risk=now.at_risk
        if now is not None and known and state in ("running", "waiting", "lost")
        else None,
        attempts=None if record is None else record.attempts,
        noticed=None if record is None else record.noticed,
        lost=None if record is None else record.lost,
        restarts=() if record is None else tuple(record.restarts),
        seconds=None if record is None else record.seconds,
        metrics=None if record is None else record.metrics,
        error=last.get("error") if ended else None,
        exit_code=record.exit_code if ended and record is not None else None,
        events=tuple(event for event in events if event["event"] not in QUIET)[-EVENTS:],
    )


def _record(head: Head) -> Record | None:
    """None of a run that nobody has trained, or whose record cannot be read."""
    try:
        return Record.model_validate(head.record) if head.record else None
    except ValidationError:
        return None


def _loss(losses: list[tuple[int, float]]) -> Loss | None:
    if not losses:
        return None
    values = [loss for _, loss in losses]
    half = len(values) // 2
    if half < 2:
        return Loss(values[-1], None, None, len(values))
    older, newer = values[:half], values[-half:]
    return Loss(values[-1], sum(older) / half, sum(newer) / half, len(values))
