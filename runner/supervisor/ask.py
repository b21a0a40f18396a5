"""The plan's side of `runner.train.inspect`: run it as a child and read its answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pydantic import ValidationError

from runner.durable import disk, write_text
from runner.errors import Preempted, RunnerError
from runner.facts import Answer, Question
from runner.supervisor.environment import environ_of_trainer
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import Child, watch
from runner.supervisor.remains import last_error
from runner.supervisor.world import Machine

INSPECTOR = (sys.executable, "-m", "runner.train.inspect")

_LIGHT = {
    "CUDA_VISIBLE_DEVICES": "",  # a plan has to come out the same where there is a GPU
    "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes would import the compiler: a sixth of all imports, for nothing
}


def ask(question: Question, folder: Path, notices: Notices) -> Answer:
    """Ask what only torch knows.

    Args:
        folder: where the question, the answer and the log are kept.

    Raises:
        Preempted: asked to stop.
        RunnerError: the process crashed.
    """
    asked, answer, log = folder / "question.json", folder / "facts.json", folder / "inspect.log"
    with disk("write the question", folder):
        write_text(asked, question.model_dump_json())
    environ = environ_of_trainer(os.environ, 1, "single", Machine.here(os.environ))
    exit = watch(
        [Child([*INSPECTOR, str(asked), str(answer)], {**environ, **_LIGHT}, log)],
        notices=notices,
        on_event=lambda event: None,
        on_notice=lambda reason: True,
        on_tick=lambda: None,
    )
    if notices.first is not None:
        raise Preempted(f"{notices.first}: stopped while planning; nothing was started")
    try:
        return Answer.model_validate_json(answer.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise RunnerError(
            f"inspect the job: it ended with {exit}; its last line: {last_error(log)}"
        ) from error
