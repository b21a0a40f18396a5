"""The exit codes as one table, for everybody who has to tell an orchestrator what to do after each.

`runner.errors` raises them; the retry rules of every target (`runner.targets`) are computed from this table
and from nothing else.

    retried      meaning for the orchestrator
    no           the same command would end the same way: give up, and say so
    uncounted    start it again, however often: nothing is wrong
    counted      start it again, up to a limit

A machine that is taken away (a disruption, in the words of Kubernetes) counts as `uncounted`, whatever the
container's exit code is then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Retried = Literal["no", "uncounted", "counted"]


@dataclass(frozen=True)
class Exit:
    """One way that a command ends."""

    meaning: str
    retried: Retried


EXITS: dict[int, Exit] = {
    0: Exit("done", "no"),
    64: Exit("usage", "no"),
    65: Exit("bad data, or no valid checkpoint", "no"),
    74: Exit("storage or network, after patience", "counted"),
    75: Exit("stopped by a notice, or with progress; the state is committed", "uncounted"),
    76: Exit("another submission owns the run", "no"),
    77: Exit("credentials or rights are missing or wrong", "no"),
    78: Exit("bad job", "no"),
    93: Exit("no progress: the same step failed twice", "no"),
}

OTHERWISE = Exit("crash", "counted")
"""Every code that the table does not have: 1, 137 (killed, mostly for memory), 139, ..."""


def of(code: int) -> Exit:
    """What an exit code, 0 to 255, means."""
    return EXITS.get(code, OTHERWISE)


def codes(retried: Retried) -> list[int]:
    """The failures of the table that are retried in this way, ascending; 0 is no failure."""
    return sorted(code for code, end in EXITS.items() if code and end.retried == retried)
