"""`python -m runner.train PLAN` on a machine with less memory: real allocations fail, at a chosen place.

    python -m tests.capped_trainer CAPS PLAN

[{"rows": 4, "step": 7}]       a pass of more than 4 rows, in training from step 7
[{"rows": 2, "attempt": 3}]    in attempt 3 alone, wherever it is
[{"room": 300}]                RLIMIT_DATA, that many MiB above what is in use at the first pass
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from runner.train.__main__ import main
from runner.train.trainer import RunTrainer

BEYOND_ANY_MACHINE = 1 << 50

caps: list[dict[str, Any]] = json.loads(sys.argv[1])
attempt: int = json.loads(Path(sys.argv[2]).read_text())["attempt"]
training_step = RunTrainer.training_step


def capped(self: RunTrainer, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
    rows = len(inputs["row_index"])
    # The probe comes before the loop, and in no step.
    step = self.state.global_step + 1 if self.is_in_train else 0
    for cap in caps:
        if "room" in cap:
            limit_data(cap["room"] << 20)
        elif attempt == cap.get("attempt", attempt) and step >= cap.get("step", 0) and rows > cap["rows"]:
            torch.empty(BEYOND_ANY_MACHINE, dtype=torch.uint8)
    return training_step(self, model, inputs, *args)


@functools.cache  # once
def limit_data(room: int) -> None:
    """Private writable memory. RLIMIT_AS would count what threads only reserve, too."""
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))


if __name__ == "__main__":
    RunTrainer.training_step = capped
    sys.exit(main(Path(sys.argv[2])))
