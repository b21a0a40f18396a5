"""The load check: an export in a fresh process, with plain transformers and PEFT, as its card says.

`runner.train.plain` is run there as a file; what it says has to be what this runner's own loading said.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ValidationError

import runner
from runner.durable import disk, write_json
from runner.errors import DataError, RunnerError
from runner.export.card import Card
from runner.export.child import kept, run_child
from runner.export.code import Base, load_lines
from runner.export.likeness import TOLERANCE, Steps, likeness
from runner.export.order import Order
from runner.supervisor.notices import Notices
from runner.supervisor.remains import last_error

PLAIN = Path(runner.__file__).parent / "train" / "plain.py"


class _Heard(BaseModel):
    """What `runner.train.plain` leaves."""

    input_ids: list[int]
    steps: Steps
    foreign: list[str]


def check(card: Card, order: Order, work: Path, notices: Notices) -> None:
    """Load the export as its card says, where nothing of this package is, and ask it.

    Raises:
        DataError: it answers something else than it did here.
        RunnerError: it does not load.
    """
    base = Base(order.base) if card.kind == "adapter" else None
    lines = load_lines(card.kind, str(order.to), card.dtype, base, card.made.quantization)
    asked, answer, log = work / "question.json", work / "answer.json", work / "plain.log"
    ours = card.made.answer
    with disk("write the question", work):
        write_json(asked, {"load": "\n".join(lines), "against": [step.ids for step in ours]})
    exit = run_child(
        [sys.executable, "-P", str(PLAIN), str(asked), str(answer)], log, notices, lambda event: None
    )
    try:
        with disk("read the answer", answer):
            heard = _Heard.model_validate_json(answer.read_bytes() if answer.is_file() else b"")
    except ValidationError as error:
        raise RunnerError(
            f"export: plain transformers cannot load it: {exit}; its last line: {last_error(log)}; nothing "
            f"was written; log: {kept(log)}"
        ) from error
    if heard.foreign:
        raise RunnerError(f"export: loading it imported {heard.foreign[0]}, so that it needs this runner")
    if heard.input_ids != card.made.input_ids:
        raise DataError(
            "export: the processor that was written makes other tokens of a question than the run's; nothing "
            "was written; remedy: report it, with the job"
        )
    same = likeness(ours, heard.steps, TOLERANCE[card.dtype])
    if not same.within:
        raise DataError(
            f"export: loaded with plain transformers it answers something else than here: at token "
            f"{same.at + 1} a logit differs by {same.apart:.1e} of the largest, and {card.dtype} allows "
            f"{TOLERANCE[card.dtype]:.0e}; nothing was written; remedy: report it, with the job"
        )
