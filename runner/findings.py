"""Checks that are all made, whatever the ones before found: each with a name, an outcome and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from runner.errors import Preempted, RunnerError

T = TypeVar("T")


class Finding(BaseModel):
    """One check of a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    """What was looked at: `model`, `columns of datasets.train[0]`, `store`."""
    status: Literal["ok", "failed", "not checked"]
    exit_code: int = 0
    """With which a run would end for it."""
    message: str = ""
    """Place, reason and remedy of what failed; why nothing was checked."""


class Findings:
    """The checks that were made, in order."""

    def __init__(self) -> None:
        self.made: list[Finding] = []

    def make(self, check: str, look: Callable[[], T]) -> T | None:
        """What `look` finds; None where it refuses, which is kept.

        Raises:
            Preempted: asked to stop; nothing was found out.
        """
        try:
            found = look()
        except Preempted:
            raise
        except RunnerError as error:
            code, message = error.exit_code, str(error)
            self.made.append(Finding(check=check, status="failed", exit_code=code, message=message))
            return None
        self.made.append(Finding(check=check, status="ok"))
        return found

    def skip(self, check: str, why: str) -> None:
        """A check that needs what another one did not find."""
        self.made.append(Finding(check=check, status="not checked", message=why))

    @property
    def exit_code(self) -> int:
        """Of the first that failed; 0 if none did."""
        return next((one.exit_code for one in self.made if one.status == "failed"), 0)
