"""TensorBoard: one file of events for each process, in one folder, which its reader takes as one run.

All numbers of a row are one record of the file, so that a kill leaves a row whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from runner.tracking.request import Request
from runner.tracking.rows import Ending, Known, Row


class TensorBoard:
    """One run."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._last = 0
        self._reader = EventAccumulator(str(request.folder), size_guidance={SCALARS: 0}).Reload()
        self._writer = EventFileWriter(str(request.folder))
        if "job" not in self._reader.Tags()["tensors"]:
            job = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in request.config.items())
            self._add(0, text_pb("job", job))

    def known(self) -> Known:
        """Every scalar of the folder."""
        tags = self._reader.Tags()["scalars"]
        return {tag: {event.step for event in self._reader.Scalars(tag)} for tag in tags}

    def log(self, rows: Sequence[Row]) -> None:
        """One event for each row."""
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            self._add(row.step, Summary(value=values), row.time)
            self._last = max(self._last, row.step)
        self._writer.flush()

    def end(self, ending: Ending | None) -> None:
        """Say how it ended, as text."""
        if ending is not None:
            said = f"{ending.outcome}, exit code {ending.exit_code}"
            self._add(self._last, text_pb("outcome", said))
        self._writer.close()

    def _add(self, step: int, summary: Summary, at: float | None = None) -> None:
        self._writer.add_event(Event(wall_time=at or time.time(), step=step, summary=summary))
