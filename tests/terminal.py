"""`runner` on a pseudo-terminal, or on files: a forked process with the fake trainer of tests/fake_rank.py.

    with Terminal(bench, ["train", "job.yaml"], columns=40) as terminal: ...
    code, out, err = piped(bench, ["train", "job.yaml", "--json"])

What a test sees is what the operating system was given.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from runner import cli, launch
from tests.machines import RANK, SCRIPT, Bench

ENVIRONMENT = {"TERM": "xterm-256color", "CUDA_VISIBLE_DEVICES": ""}

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(bench: Bench, words: list[str], environ: Mapping[str, str], faults: tuple[Any, ...]) -> int:
    """The command, in a process that was forked for it."""
    (bench.path / "job.yaml").write_text(json.dumps(bench.job))
    os.chdir(bench.path)
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    os.environ.update({**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1]), **environ})
    trainer = [sys.executable, str(RANK), json.dumps({**SCRIPT, "faults": faults})]
    for verb in (launch.train, launch.evaluate):
        assert verb.__kwdefaults__ is not None
        verb.__kwdefaults__["trainer"] = trainer
    sys.argv = ["/x/.venv/lib/runner/__main__.py", *words]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    try:
        cli.entry()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


class Terminal:
    """A command on a terminal of its own."""

    def __init__(
        self,
        bench: Bench,
        words: list[str],
        *faults: dict[str, Any],
        columns: int = 80,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            code = 99
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                code = run(bench, words, environ or {}, faults)
            finally:
                os._exit(code)
        self.output = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()

    def read(self, seconds: float = 0.05) -> bool:
        """Take what it shows now. False: it has gone."""
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # EIO: nobody has the other end any more
            return False
        self.output += data.decode()
        return bool(data)

    def finish(self) -> int:
        """Its exit code, after all that it showed."""
        deadline = time.monotonic() + 60
        while self.read():
            assert time.monotonic() < deadline, self.output
        return self.code()

    def code(self) -> int:
        """Its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def hang_up(self) -> None:
        """The terminal goes away."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    @property
    def rows(self) -> list[str]:
        """Every row that it was given, without colours and movements."""
        return [row for row in re.split(r"[\r\n]+", ESCAPES.sub("", self.output)) if row.strip()]


def piped(
    bench: Bench, words: list[str], *faults: dict[str, Any], environ: Mapping[str, str] | None = None
) -> tuple[int, bytes, str]:
    """The same on files: exit code, standard output and standard error."""
    out, err = bench.path / "stdout", bench.path / "stderr"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for file, fd in ((out, 1), (err, 2)):
                with file.open("wb") as opened:
                    os.dup2(opened.fileno(), fd)
            code = run(bench, words, environ or {}, faults)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, out.read_bytes(), err.read_text()
