"""What a trainer forks, as data loader workers are, ends with it however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FORKS = """
import os, pathlib, signal, sys, time
from runner.train.channel import Channel

def until_orphaned():
    while os.getppid() != 1 and {late}:
        time.sleep(0.01)

os.register_at_fork(after_in_child=until_orphaned)
Channel.from_environment(pathlib.Path("."))
child = os.fork()
if not child:
    time.sleep(600)
    os._exit(0)
time.sleep(0.0 if {late} else 0.3)
os.write(1, str(child).encode())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")
@pytest.mark.parametrize("late", [False, True])
def test_no_forked_process_outlives_its_trainer(tmp_path: Path, late: bool) -> None:
    """Late: its trainer is dead before the forked process begins."""
    read, write = os.pipe()
    environ = {**os.environ, "RUNNER_LIFELINE_FD": str(read)}
    said = tmp_path / "child"
    with said.open("wb") as output:
        program = [sys.executable, "-c", FORKS.format(late=late)]
        subprocess.run(program, env=environ, pass_fds=(read,), stdout=output, cwd=tmp_path)
    os.close(read)
    os.close(write)
    child = Path(f"/proc/{int(said.read_text())}/stat")
    until = time.monotonic() + 20
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.02)
