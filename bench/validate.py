"""How long `runner validate` takes on a good job, beside what importing torch alone would cost.

Whole processes, in turn, medians of ten after one warm-up each. Run as `make bench` or
`python bench/validate.py`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 10
ROOT = Path(__file__).parents[1]
COMMANDS = {
    "runner validate jobs/chartqa-sft.yaml": [
        sys.executable,
        "-m",
        "runner",
        "validate",
        "jobs/chartqa-sft.yaml",
    ],
    'python -c "import torch"': [sys.executable, "-c", "import torch"],
    'python -c "pass"': [sys.executable, "-c", "pass"],
}


def seconds(command: list[str]) -> float:
    """Wall seconds of one run of the whole process."""
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(RUNS + 1):
        for name, command in COMMANDS.items():
            wall = seconds(command)
            if turn > 0:
                taken[name].append(wall)
    for name, walls in taken.items():
        print(f"{statistics.median(walls):6.3f} s  (min {min(walls):.3f}, max {max(walls):.3f})  {name}")


if __name__ == "__main__":
    main()
