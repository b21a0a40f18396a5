"""`python -m runner.tracking REQUEST`: a tracker follows a run until its stdin ends, then ends its own run.

What goes wrong ends this process with a traceback on stderr; the supervisor says so, and starts it again. The
end of stdin is the end of the command that started it, however that ended.
"""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

from runner.tracking.feed import Feed
from runner.tracking.request import Request
from runner.tracking.rows import fresh, note
from runner.tracking.tracker import opened

EVERY = 2.0
"""Seconds between two looks at the run's folder."""

NICE = 10
"""Training comes first."""


def main() -> int:
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    os.nice(NICE)
    feed = Feed(request.run_dir, request.batch, request.before)
    tracker = opened(request)
    known = tracker.known()
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], EVERY)[0])
        if rows := fresh(feed.look(), known):
            tracker.log(rows)
            note(rows, known)
    tracker.end(feed.ending)
    return 0


if __name__ == "__main__":
    sys.exit(main())
