"""`python -m runner.train PLAN`: one attempt of one run, from the plan to the outcome.

    load config and processor -> prepare and audit the data -> load the model -> evaluate before
    -> train, from the checkpoint that the plan names -> export -> evaluate after -> outcome.json

Every end but a crash leaves `outcome.json` in the attempt's folder, of another rank than the first
`outcome-<rank>.json`; the supervisor decides from them.
This is one of the two places with a broad `except`: what was not foreseen is recorded and raised again.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

# cuBLAS is deterministic only with this set before its first handle (NVIDIA, cuBLAS documentation, 2.1.4).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from runner.durable import write_json
from runner.errors import Preempted, RunnerError
from runner.plan import Plan
from runner.tracking.choice import PACKAGES
from runner.train.channel import Channel


def leave_out_trackers() -> None:
    """Make them look as if they were not installed: runner/tracking/ tracks, in processes of its own.

    TRL (1.16) imports wandb where it is installed, and DeepSpeed (0.19) mlflow: a fifth of the time that a
    trainer's imports take. What is imported already stays.
    """
    for package, _ in PACKAGES.values():
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def main(plan_file: Path) -> int:
    """Run the plan and write its outcome. Returns the exit code that the outcome names."""
    plan = Plan.model_validate_json(plan_file.read_text(encoding="utf-8"))
    channel = Channel.from_environment(plan.attempt_dir)
    outcome: dict[str, Any] = {"format": 1, "error": None}
    rank = int(os.environ.get("RANK", "0"))
    file = plan.attempt_dir / ("outcome.json" if rank == 0 else f"outcome-{rank}.json")
    leave_out_trackers()
    try:
        # torch and transformers load here, inside the guard
        import runner.train.deferred  # noqa: F401 (before others import what it imports)

        # isort: split
        from runner.train.run import evaluate_only, train
        from runner.train.world import joined

        with joined():
            result = train(plan, channel) if plan.purpose == "train" else evaluate_only(plan, channel)
        outcome |= {"outcome": "done", "exit_code": 0, **result}
    except Preempted as error:
        outcome |= {"outcome": error.outcome, "exit_code": error.exit_code, "error": str(error)}
    except RunnerError as error:
        traceback.print_exc()
        outcome |= {"outcome": error.outcome, "exit_code": error.exit_code, "error": str(error)}
    except Exception as error:
        outcome |= {"outcome": "failed", "exit_code": 1, "error": f"{type(error).__name__}: {error}"}
        write_json(file, outcome)
        raise
    write_json(file, outcome)
    return int(outcome["exit_code"])


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    if code not in (0, Preempted.exit_code) and os.environ.get("WORLD_SIZE", "1") != "1":
        # A rank that failed would wait, on its way out, for what the others still have under way.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)
