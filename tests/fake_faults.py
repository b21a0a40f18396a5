"""How a fake trainer (tests/fake_rank.py) breaks down: at a place, in one attempt or in all.

{"at": "step:4", "attempt": 1, "rank": 1, "above": 2, "how": "kill"}

at    load, probe (trying the plan's size), step:N (in the middle of it), saving:N (half written),
      saved:N (published, not told), told:N (before anything else), waiting:N (while the supervisor makes
      it wait, after step N), evaluate, outcome (after it is written)
how   kill, exit, orphan (kill the supervisor), noise (on the events pipe), rot (flip a byte of the
      published checkpoint), crash:CODE (an outcome), full (an outcome: out of memory), eat (memory,
      without end), swell:MIB (hold that much memory until killed), stall (do nothing more until killed),
      linger (the same, and say so by a file `waiting`), wait (the same, until asked to stop)
rank  in which of several; 0 if absent
above only where the plan's per-device size is above this
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.request import Reader

NOISE = b"\x00\xff not json\n" + b"x" * 3_000_000 + b"\n[1]\n" + b'{"event": "step"}\n'
TRACEBACK = "Traceback (most recent call last):\n  File ...\nRuntimeError: no luck\nlater noise"


def checkpoint_id(plan: dict[str, Any], step: int) -> str:
    """As `runner.plan.checkpoint_id`, from a plan that is only JSON here."""
    return f"{step:08d}-{plan['epoch']:06d}-{plan['attempt']:04d}"


class Faults:
    """The faults of one attempt.

    Args:
        write: puts bytes on the events pipe.
        end: writes an outcome, code, error; does not return.
    """

    def __init__(
        self,
        faults: list[dict[str, Any]],
        plan: dict[str, Any],
        rank: int,
        write: Callable[[bytes], object],
        end: Callable[..., None],
    ) -> None:
        self._plan = plan
        self._folder = Path(plan["attempt_dir"])
        self._write = write
        self._end = end
        attempt, size = plan["attempt"], plan["geometry"]["per_device"]
        self._faults = [
            fault
            for fault in faults
            if fault.get("attempt", attempt) == attempt
            and fault.get("rank", 0) == rank
            and size > fault.get("above", 0)
        ]

    def at(self, place: str) -> None:
        """Break down here, if that is planned."""
        for fault in self._faults:
            if fault["at"] == place:
                self._break_down(fault["how"], place)

    def _break_down(self, planned: str, place: str) -> None:
        how, _, number = planned.partition(":")
        match how:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                print(TRACEBACK, flush=True)
                os._exit(3)
            case "orphan":
                (self._folder / "pid").write_text(str(os.getpid()))
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
            case "noise":
                self._write(NOISE)
            case "rot":
                name = checkpoint_id(self._plan, int(place.partition(":")[2]))
                path = Path(self._plan["run_dir"]) / "outbox" / name / "state.json"
                path.write_bytes(path.read_bytes()[:-1] + b"~")
            case "crash":
                self._end("failed", int(number), error=f"row 3 of data is bad, says {number}")
            case "full":
                self._end("out_of_memory", 1, error="it does not fit")
            case "eat":
                self._eat()
            case "swell":
                held = b"x" * (int(number) << 20)
                self._linger(lambda: not held)
            case "stall":
                signal.pause()
            case "linger":
                self._linger(lambda: False)
            case "hold":
                self._linger((self._folder / "go").exists)
            case "wait":
                requests = Reader(self._folder)
                self._linger(lambda: requests.now().action == "stop")

    def _linger(self, until: Callable[[], bool]) -> None:
        (self._folder / "waiting").touch()
        while not until():
            time.sleep(0.005)

    def _eat(self) -> None:
        eaten = []
        while True:
            eaten.append(b"x" * (1 << 24))
