"""What training pays for checkpoints when the store is slow: steps per second, beside a run that saves none.

The demo's job runs by the public command, in turn with a save about every twenty seconds into a bucket whose
every answer comes 500 ms late, and without any save before its last step. A step counts from its own event to
the next one's; saves, commits, renewals and the supervisor's own work are all in between. The store is the
server of the tests in a process of its own, which takes its part of the same cores. Run as `make bench` or
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


def run(folder: Path, name: str, steps: int, *overrides: str) -> tuple[float, int, float]:
    """One run: steps per second, checkpoints committed while it trained, the supervisor's peak in MB."""
    command = [sys.executable, "-m", "runner", "train", "jobs/demo-sft.yaml", "--runs", str(folder)]
    command += [f"name={name}", f"training.max_steps={steps}", *OVERRIDES, *overrides]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
            time.sleep(0.5)
    if process.returncode != 0:
        sys.exit((folder / f"{name}.log").read_text()[-2000:])
    events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events if event["event"] == "step"]
    first = 5  # the first steps warm up
    commits = sum(event["event"] == "commit" and event["step"] < steps for event in events)
    return (len(times) - 1 - first) / (times[-1] - times[first]), commits, peak / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of short runs")
    quick = parser.parse_args().quick
    rounds, seconds = (1, 25.0) if quick else (4, 65.0)
    with tempfile.TemporaryDirectory() as place, s3_server() as port, late(port, LATE) as slow:
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{slow}")
        folder = Path(place)
        rate, _, _ = run(folder, "warm", 40)
        steps, every = round(rate * seconds), max(1, round(rate * (EVERY if not quick else 8.0)))
        ratios, peaks = [], []
        for number in range(rounds):
            # In turn, and in another order every time: the machine is not the same for long.
            rates = {}
            for kind in ("without", "with")[:: 1 if number % 2 else -1]:
                saves = [f"checkpoints.uri=s3://{BUCKET}/x", f"checkpoints.save_steps={every}"]
                rates[kind], commits, peak = run(
                    folder, f"{kind}-{number}", steps, *(saves if kind == "with" else [])
                )
                if kind == "with":
                    peaks.append(peak)
                    said = f"{commits} commits, every {every} steps"
            ratios.append(rates["with"] / rates["without"])
            pair = f"{rates['without']:.3f} steps/s without, {rates['with']:.3f} with ({said})"
            print(f"round {number + 1}: {pair}: {ratios[-1]:.3f}", flush=True)
        print(f"ratio {statistics.median(ratios):.3f}  (median; {min(ratios):.3f} to {max(ratios):.3f})")
        print(f"supervisor: {max(peaks):.0f} MB at its peak")


if __name__ == "__main__":
    main()
