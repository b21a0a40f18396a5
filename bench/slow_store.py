"""What training pays for checkpoints when the store is slow: steps per second, beside a run that saves none.

The demo's job runs twice at once by the public command: with a save about every twenty seconds into a bucket
whose every answer comes 500 ms late, and without any save before its last step. Each run has one core for its
trainer and its supervisor together, and the two change cores from round to round, so that whatever else the
machine does meets both; one after the other they differed by a tenth for no reason of theirs. A step counts
from its own event to the next one's; saves, commits, renewals and the supervisor's own work are all in
between. The store, the server of the tests, takes its part of either core. Run as `make bench` or
`python bench/slow_store.py [--quick]`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.s3_server import BUCKET, ENVIRONMENT, s3_server  # noqa: E402

LATE = 0.5
EVERY = 20.0
OVERRIDES = (
    "evaluation=null",
    "training.global_batch_size=16",
    "training.per_device_train_batch_size=16",
    "checkpoints.max_loss=10m",
)


@contextlib.contextmanager
def late(port: int, seconds: float) -> Iterator[int]:
    """A way to a server on which every answer takes this much longer; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket, asked: threading.Event, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not answers:
                    asked.set()
                elif asked.is_set():  # the first bytes since a request
                    asked.clear()
                    time.sleep(seconds)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                asked = threading.Event()
                for ends in ((client, server, asked, False), (server, client, asked, True)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


class Run:
    """One run of the demo, begun at once, on one core."""

    def __init__(self, folder: Path, name: str, core: int, steps: int, *overrides: str) -> None:
        self.steps = steps
        self._folder = folder / name
        self._log = folder / f"{name}.log"
        command = [sys.executable, "-m", "runner", "train", "jobs/demo-sft.yaml", "--runs", str(folder)]
        command += [f"name={name}", f"training.max_steps={steps}", *OVERRIDES, *overrides]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        os.sched_setaffinity(self._process.pid, {core})

    def end(self) -> float:
        """Wait for it. Returns the supervisor's peak memory in MB."""
        peak = 0
        while self._process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
                peak = max(peak, int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
            time.sleep(0.5)
        if self._process.returncode != 0:
            sys.exit(self._log.read_text()[-2000:])
        return peak / 1000

    def times(self) -> list[float]:
        """When its steps ended, without the first ones, which warm up."""
        return [event["time"] for event in self._events() if event["event"] == "step"][5:]

    def commits(self) -> int:
        """Checkpoints that were committed while it trained."""
        return sum(event["event"] == "commit" and event["step"] < self.steps for event in self._events())

    def _events(self) -> list[Any]:
        return [json.loads(line) for line in (self._folder / "events.jsonl").read_text().splitlines()]


def rates(*runs: list[float]) -> list[float]:
    """Steps a second of each, in the time that all of them trained."""
    begin, end = max(times[0] for times in runs), min(times[-1] for times in runs)
    within = [[time for time in times if begin <= time <= end] for times in runs]
    return [(len(times) - 1) / (times[-1] - times[0]) for times in within]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    quick = parser.parse_args().quick
    rounds, seconds = (1, 25.0) if quick else (4, 80.0)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("slow_store: two cores are needed, one for each of the runs that are compared")
    with tempfile.TemporaryDirectory() as place, s3_server() as port, late(port, LATE) as slow:
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{slow}")
        folder = Path(place)
        warm = [Run(folder, f"warm-{core}", core, 25) for core in cores]
        for run in warm:
            run.end()
        rate = min(rates(*(run.times() for run in warm)))
        steps, every = round(rate * seconds), max(1, round(rate * (EVERY if not quick else 8.0)))
        ratios, peaks = [], []
        for number in range(rounds):
            saves = [f"checkpoints.uri=s3://{BUCKET}/x", f"checkpoints.save_steps={every}"]
            saving = Run(folder, f"with-{number}", cores[number % 2], steps, *saves)
            plain = Run(folder, f"without-{number}", cores[1 - number % 2], steps)
            peaks.append(saving.end())
            plain.end()
            fast, slower = rates(plain.times(), saving.times())
            ratios.append(slower / fast)
            pair = f"{fast:.3f} steps/s without, {slower:.3f} with"
            said = f"{saving.commits()} commits, every {every} steps"
            print(f"round {number + 1}: {pair} ({said}): {ratios[-1]:.3f}", flush=True)
        # The cores need not be alike; every other round has them changed.
        mean = statistics.geometric_mean(ratios)
        print(f"ratio {mean:.3f}  (geometric mean; {min(ratios):.3f} to {max(ratios):.3f})")
        print(f"supervisor: {max(peaks):.0f} MB at its peak")


if __name__ == "__main__":
    main()
