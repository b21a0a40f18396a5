"""What asks a run to stop: SIGINT, SIGTERM, SIGHUP, a file that somebody makes, the cloud, another machine of
the run. What asks it only to save: the cloud. Collected, never acted upon here: what they mean is the
business of who reads them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class Notices:
    """The notices of one supervisor, collected while the context lasts.

    A second one hurries, if it comes `apart` seconds after the first: GNU `timeout` and some shells send
    one notice twice at once, to the process and to its group. A signal that was ignored stays ignored,
    as under nohup.

    The stop file is for whoever can reach the run's folder and not its process. Taking it removes it, so that
    the next command goes on. One that is there from the start counts too: asked for once too often costs
    that command, which says why it stopped; asked for in vain would cost the machine.

    Args:
        stop_file: where to look for it; None: nowhere.
        beat: called at every look: whoever waits for a notice lives.
    """

    def __init__(
        self,
        apart: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        stop_file: Path | None = None,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self._apart = apart
        self._clock = clock
        self._at: float | None = None
        """When the first of this machine came."""
        self._old: dict[int, Any] = {}
        self._stop_file = stop_file
        self._beat = beat
        self._write: int | None = None
        self._guard = threading.Lock()
        """Of `_write`: a number that was closed may be somebody else's by now."""
        self._advice: str | None = None
        self.first: str | None = None
        """What asked to stop: the name of a signal, `stop file <path>`, or what the cloud or another machine
        said."""
        self.until: float | None = None
        """On the clock, when the machine will be gone; None: no notice said it."""
        self.hurry = False

    def __enter__(self) -> Self:
        self.wakeup, self._write = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self._write, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._on_signal)
        # A handler, so that a dead child wakes the loop through the wake-up pipe.
        self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self.poll()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        with self._guard:
            write, self._write = self._write, None
        os.close(self.wakeup)
        if write is not None:
            os.close(write)

    def wake(self) -> None:
        """Make `watch` look again at once. From any thread; outside the context it does nothing."""
        with self._guard, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            if self._write is not None:
                os.write(self._write, b"\0")

    def hear(self, what: str, seconds: float | None = None) -> None:
        """Take a notice of the cloud, or of another machine. From any thread. It hurries nobody, nor does the
        first of this process after it: all machines of a run are asked to stop at about the same time, and
        what the cloud has said a signal says again.

        Args:
            seconds: until the machine is gone; None: nobody knows.
        """
        if seconds is not None:
            until = self._clock() + seconds
            self.until = until if self.until is None else min(until, self.until)
        self.first = self.first or what
        self.wake()

    @property
    def left(self) -> float | None:
        """Seconds until the machine is gone, as a notice said; None: none did."""
        return None if self.until is None else max(0.0, self.until - self._clock())

    def advise(self, what: str) -> None:
        """Take an advice to save now. From any thread."""
        self._advice = what
        self.wake()

    def advice(self) -> str | None:
        """The advice that came since the last call, if any; of several the newest."""
        taken, self._advice = self._advice, None
        return taken

    def poll(self) -> None:
        """Look for the stop file, and take it. Whoever waits does so, at every tick."""
        self._beat()
        path = self._stop_file
        if path is None:
            return
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:  # a folder, or not ours to remove: it stays, so it counts once
            if not os.path.lexists(path):
                return
            self._stop_file = None
        self._note(f"stop file {path}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number).name)

    def _note(self, what: str) -> None:
        now = self._clock()
        if self._at is None:
            self.first, self._at = self.first or what, now
        elif now - self._at >= self._apart:
            self.hurry = True
