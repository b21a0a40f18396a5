"""When two models give the same answers: their logits, and the words that follow from them. Pure.

A merged model and its base with the adapter beside it compute the same function in another order: they differ
by roundings, so that no two of their logits are equal, and a token may be another one where two are equally
likely. So an answer is compared token by token, as both models generate it, up to where they part:

    logits of the likeliest tokens    chosen token    answer
    within the tolerance              the same        go on
    within the tolerance              another         a tie: rounding decides it; nothing after it compares
    further apart                     any             another model

The tolerance is a share of the largest logit of a step (`TOLERANCE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Most that a logit may differ by, as a share of the largest one of its step, by the dtype of the weights.

4 to 190 times what rounding makes of the demo's model (64 answers, two cores: float32 5.2e-7, float16 1.1e-3,
bfloat16 1.6e-2; roundings add up over layers, and that has four), and far below what an adapter does."""

LOOKED_AT = 10
"""Likeliest tokens of a step that are compared."""


class Step(BaseModel):
    """One generated token."""

    model_config = ConfigDict(frozen=True)

    token: int
    """The one that was chosen."""
    ids: tuple[int, ...]
    """Tokens whose logits these are: the likeliest ones of the model that was asked first."""
    logits: tuple[float, ...]
    scale: float
    """Largest absolute logit of the step."""


Steps = tuple[Step, ...]
"""An answer, with its end."""


@dataclass(frozen=True)
class Likeness:
    """How one answer compares."""

    equal: bool
    """Every token is the same."""
    apart: float
    """Largest difference of a logit, as a share of its step's scale."""
    at: int
    """The step where it was, from 0."""
    within: bool
    """Whether that is within the tolerance; answers that are not equal then part in a tie."""


def likeness(expected: Steps, found: Steps, tolerance: float) -> Likeness:
    """Compare two answers to one question, as the table says.

    Args:
        found: its `ids` are those of `expected`, step by step, as far as both go together.
        tolerance: of `TOLERANCE`.
    """
    apart, at = 0.0, 0
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        differences = [abs(a - b) for a, b in zip(one.logits, other.logits, strict=True)]
        # One that none of the likeliest tokens of the other is: what it thinks of it was not looked at.
        unlikely = other.token not in one.ids
        here = float("inf") if unlikely else max(differences) / max(one.scale, 1e-30)
        if not here <= apart:  # a NaN is the largest of all
            apart, at = here, number
        if one.token != other.token or not here <= tolerance:
            return Likeness(one.token == other.token, apart, at, apart <= tolerance)
    return Likeness(len(expected) == len(found), apart, at, apart <= tolerance)


class Compared(BaseModel):
    """Two models over many questions."""

    model_config = ConfigDict(frozen=True)

    questions: int
    equal: int
    """Answers with the same tokens."""
    ties: int
    """Answers that part where two tokens were equally likely, within the tolerance."""
    tolerance: float
    apart: float
    """Largest difference, as a share of the largest logit of its step."""


def compared(pairs: Sequence[Likeness], tolerance: float) -> Compared:
    """Sum up answers that are all within the tolerance."""
    return Compared(
        questions=len(pairs),
        equal=sum(one.equal for one in pairs),
        ties=sum(not one.equal for one in pairs),
        tolerance=tolerance,
        apart=max((one.apart for one in pairs), default=0.0),
    )
