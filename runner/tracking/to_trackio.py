"""trackio: a database beside the run, where TRACKIO_DIR says; `trackio sync` sends it to a Space."""

from __future__ import annotations

from collections.abc import Sequence

import trackio
from trackio.sqlite_storage import SQLiteStorage  # trackio.Api has no metrics; `trackio show` reads with it

from runner.tracking.request import Request
from runner.tracking.rows import Ending, Known, Row

_OTHERS = {"timestamp", "step"}


class Trackio:
    """One run."""

    def __init__(self, request: Request) -> None:
        self._project = request.project
        self._name = f"{request.name}-{request.id[:8]}"
        self._run = trackio.init(
            project=self._project,
            name=self._name,
            resume="allow",
            config=dict(request.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._known: Known = {}
        for row in SQLiteStorage.get_logs(self._project, self._name):
            for name in row.keys() - _OTHERS:
                self._known.setdefault(name, set()).add(row["step"])

    def known(self) -> Known:
        """Every row of the database, when it was opened."""
        return self._known

    def log(self, rows: Sequence[Row]) -> None:
        """One row for each."""
        for row in rows:
            self._run.log(dict(row.values), step=row.step)

    def end(self, ending: Ending | None) -> None:
        """Write what is still in memory, and how it ended."""
        if ending is not None:
            told = {"outcome": ending.outcome, "exit_code": ending.exit_code, **ending.summary}
            self._run.log({f"end/{name}": value for name, value in told.items()})
        self._run.finish()
