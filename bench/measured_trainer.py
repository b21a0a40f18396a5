"""`python -m runner.train`, and then `measured.json` beside the plan: what `process_facts` reads, and whether
products in bfloat16 were computed in blocks: where RUNNER_BENCH_BLOCKS is set and this CPU needs it.

Run as `python bench/measured_trainer.py PLAN.json`, by `attempt.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import bfloat16_blocks
from process_facts import process_facts

from runner.train.__main__ import main

if __name__ == "__main__":
    plan = Path(sys.argv[1])
    blocks = bool(os.environ.get("RUNNER_BENCH_BLOCKS")) and bfloat16_blocks.wanted()
    if blocks:
        bfloat16_blocks.install()
    code = main(plan)
    plan.with_name("measured.json").write_text(json.dumps({**process_facts(), "blocks": blocks}))
    sys.exit(code)
