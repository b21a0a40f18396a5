"""The supervisor's side of `runner.supervisor.fetch`: run it as a child and read its answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from runner.durable import disk, write_text
from runner.errors import Preempted, RunnerError
from runner.events import Event
from runner.supervisor.fetch import Answer, Request, read_answer
from runner.supervisor.notices import Notices
from runner.supervisor.ranks import Child, watch
from runner.supervisor.remains import last_error

FETCHER = (sys.executable, "-m", "runner.supervisor.fetch")


def fetched(
    request: Request,
    folder: Path,
    notices: Notices,
    say: Callable[[Event], None],
    on_tick: Callable[[], str | None] = lambda: None,
) -> Answer:
    """Fetch what a job names.

    Args:
        folder: where the request, the answer and the log are kept.
        say: takes the events of the download.
        on_tick: as `runner.supervisor.ranks.watch` takes it; what it raises ends the download, and passes on.

    Raises:
        DataError, AccessDenied, StorageError: as `runner.supervisor.fetch.fetch` does.
        Preempted: asked to stop; what was downloaded stays in the cache.
        RunnerError: the process crashed.
    """
    asked, answer, log = folder / "request.json", folder / "answer.json", folder / "fetch.log"
    with disk("write the fetch request", folder):
        folder.mkdir(exist_ok=True)
        write_text(asked, request.model_dump_json())
        answer.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
    say({"event": "phase", "phase": "fetch"})
    exit = watch(
        [Child([*FETCHER, str(asked), str(answer)], os.environ, log)],
        notices=notices,
        on_event=say,
        on_notice=lambda reason: True,
        on_tick=on_tick,
    )
    with disk("read the fetch answer", answer):
        found = read_answer(answer)
    if notices.first is not None:
        raise Preempted(
            f"{notices.first}: stopped while fetching; what was downloaded stays in the cache; the same "
            "command goes on"
        )
    if found is None:
        raise RunnerError(f"fetch: it ended with {exit}; its last line: {last_error(log)}; log: {log}")
    return found
