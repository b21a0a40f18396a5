"""Signals wait while something is made that must be whole or not there."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def signals_later() -> Iterator[Callable[[], None]]:
    """Keep SIGINT, SIGTERM and SIGHUP (a terminal that is closed) until the block ends; for the main thread.
    What is ignored, as by nohup, stays so.

    Yields:
        A check that raises KeyboardInterrupt when one came.
    """
    came: list[int] = []

    def asked() -> None:
        if came:
            raise KeyboardInterrupt

    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = [signal.signal(number, lambda got, frame: came.append(got)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
