"""`python -m runner.train`, and then `measured.json` beside the plan: what `process_facts` reads.

Run as `python bench/measured_trainer.py PLAN.json`, by `attempt.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from process_facts import process_facts

from runner.train.__main__ import main

if __name__ == "__main__":
    plan = Path(sys.argv[1])
    code = main(plan)
    plan.with_name("measured.json").write_text(json.dumps(process_facts()))
    sys.exit(code)
