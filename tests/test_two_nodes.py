"""Two nodes train one run: two commands on this machine, each with its own `--runs`, real trainers over gloo.

The pair loses a node, goes on from its checkpoint, and ends as one process does that nobody disturbed. What
takes no trainer to be seen is in tests/test_team.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.attempts import JOB, merged, run, steps

CHANGES: dict[str, Any] = {
    "training": {"per_device_train_batch_size": 4, "num_train_epochs": 6},
    "checkpoints": {"save_steps": 2},
}
"""Twelve steps."""


class Nodes:
    """Two nodes of a run, started again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._job = folder / "job.yaml"
        self._job.write_text(yaml.safe_dump(merged(merged(JOB, CHANGES), {"launch": {"nodes": 2}})))
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            leader = f"127.0.0.1:{server.getsockname()[1]}"
        zero, one = (self._node(index, leader) for index in range(2))
        return zero, one

    def _node(self, index: int, leader: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "runner", "train", self._job, "--runs", self.runs(index)]
        environ = {
            **os.environ,
            "RUNNER_NODE_RANK": str(index),
            "RUNNER_LEADER": leader,
            "OMP_NUM_THREADS": "1",
        }
        with self._log(index).open("ab") as log:
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def runs(self, index: int) -> Path:
        return self._folder / f"node-{index}"

    def _log(self, index: int) -> Path:
        return self._folder / f"node-{index}.log"

    @property
    def said(self) -> str:
        """What both printed, and the ends of their trainers' logs."""
        logs = [self._log(0), self._log(1), *sorted(self._folder.rglob("trainer*.log"))]
        return "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in logs)

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.runs(0) / "test" / "events.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not true():
            assert all(process.poll() is None for process in self._processes[-2:]), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def end(self, process: subprocess.Popen[bytes], seconds: float = 60) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(self.said)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


def test_two_nodes_lose_one_and_end_as_one_process_does(nodes: Nodes, tmp_path: Path) -> None:
    zero, one = nodes.start()
    nodes.until(lambda: bool(nodes.events("commit")))
    one.kill()
    began = time.monotonic()
    assert nodes.end(zero) == 75, nodes.said
    assert time.monotonic() - began < 60
    assert "node 1 is lost: the connection " in nodes.said
    assert "the ranks of all nodes were ended; the same command on all nodes goes on" in nodes.said

    zero, one = nodes.start()
    assert (nodes.end(zero, 120), nodes.end(one)) == (0, 0), nodes.said
    assert nodes.events("attempt")[-1]["step"] >= 2
    result = json.loads((nodes.runs(0) / "test" / "result.json").read_text())
    assert (result["steps"], result["fidelity"], result["facts"]["geometry"]["world"]) == (12, "exact", 2)
    assert list(nodes.runs(1).rglob("restored")) == []
    record = (nodes.runs(0) / "test" / "steps.jsonl").read_text().splitlines()
    outcome, events = run(tmp_path / "alone", CHANGES)
    assert outcome["outcome"] == "done"
    alone = [step["loss"] for step in steps(events)]
    assert [json.loads(line)["loss"] for line in record] == pytest.approx(alone, abs=1e-4)
