"""A trainer's command for supervisors that begins at once: its process is forked from one that has imported
the libraries already (`tests.attempts`), which takes longer than most attempts of these tests do.

    launch.train(resolved, runs, trainer=warm.command("runner.train"))

The supervisor starts `tests/warm_client.py`, which asks this process for the trainer: same output, pipes and
environment, and a SIGKILL for one is one for both. Its parent is not the supervisor. Trainers that start as
a person's do, with nothing imported, are in tests/test_resume.py and test_readme.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.attempts import FORKS, start_as_a_program

CLIENT = Path(__file__).with_name("warm_client.py")

_LARGEST = 1 << 17
"""Bytes of what a client sends: an environment and a command line."""


def command(module: str, *arguments: str) -> list[str]:
    """What does as `python -m MODULE ARGUMENTS...`. Before a supervisor is forked: it starts a thread."""
    return [sys.executable, "-I", "-S", str(CLIENT), _address(), module, *arguments]


@functools.cache
def _address() -> str:
    """Where clients find this process."""
    path = str(Path(tempfile.mkdtemp(dir=os.environ["HOME"]), "warm"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()

    def listen() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client,), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    return path


def _serve(client: socket.socket) -> None:
    """Run one trainer."""
    with client:
        asked, fds, _, _ = socket.recv_fds(client, _LARGEST, 8)
        if not asked:  # killed before it could say anything
            return
        pipes = [Connection(fd) for fd in fds]
        process = FORKS.Process(target=_trainer, args=(json.loads(asked), pipes))
        process.start()
        for pipe in pipes:
            pipe.close()
        if process.sentinel not in wait([process.sentinel, client]):
            process.kill()
        with contextlib.suppress(ProcessLookupError):  # workers of its data loader, which hold its pipes open
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        with contextlib.suppress(OSError):
            client.send(str(process.exitcode).encode())


def _trainer(asked: dict[str, Any], pipes: list[Connection]) -> None:
    """In the forked process: what the client was asked to be."""
    os.setsid()
    start_as_a_program()
    for number, pipe in enumerate(pipes[:2], start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    held = {name: str(os.dup(pipe.fileno())) for name, pipe in zip(asked["pipes"], pipes[2:], strict=True)}
    for pipe in pipes[2:]:
        pipe.close()
    os.environ.clear()
    os.environ.update(asked["environ"], **held)
    module, *arguments = asked["command"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
