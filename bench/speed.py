"""Our training steps against plain TRL's: the same model, rows, order and seed, losses compared before speed.

Every variant of every case (`speed_cases`) trains in a process of its own, ours as the supervisor starts it,
TRL's as a course's script does; plain TRL takes the rows of each step as our run took them. When the losses
of a step differ by more than a limit, no speed is printed, nothing is kept, and the command ends with 1. The
table has the samples per second by the median step, MFU (`speed_flops`), peak memory, and the share of a
step that waits for data.

On a CPU: SmolVLM's proportions, 13 tiles and about 1,100 tokens of prompt, float32, where the limit is 1e-5.
Part of the ratio belongs to CPUs: on a GPU, TRL too projects only the tokens that carry loss through the
head. On a GPU: `--device cuda --model smolvlm` or `qwen2vl-7b`, real sizes with random weights, 4-bit,
bfloat16, where equal sums round differently. It ends by itself after `--minutes`; what did not fit is listed
as not run.

Run as `make bench` or `python bench/speed.py [--help]`. `--results bench/results` keeps what was measured,
and `python bench/speed_table.py` puts it into docs/speed.md; `--steps 20 --minutes 60` is the longer run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for both, as the supervisor sets it for trainers

from speed_cases import CASES, Case
from speed_flops import peak
from speed_models import MODELS, TINY, build
from speed_record import keep, record
from speed_rows import build_rows, sample
from speed_runs import Bench, Runs, measure
from speed_table import differences, rendered, too_different


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="default: proportions on a CPU, smolvlm on a GPU")
    parser.add_argument("--steps", type=int, help="optimizer steps of every case")
    parser.add_argument("--rounds", type=int, default=2, help="at most so many")
    parser.add_argument("--minutes", type=float, default=9.5, help="how long the command may take")
    parser.add_argument("--only", action="append", metavar="VARIANT", help="may be repeated")
    parser.add_argument("--tiny", action="store_true", help="the smallest model of that architecture")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keep what was measured there")
    said = parser.parse_args()
    if unknown := sorted(set(said.cases) - set(CASES)):
        parser.error(f"no such case: {', '.join(unknown)}; known: {', '.join(CASES)}")
    said.model = said.model or ("proportions" if said.device == "cpu" else "smolvlm")
    return said


def built(bench: Bench, said: argparse.Namespace) -> list[Runs]:
    """Write the model, and the rows of each case."""
    model = bench.folder / "model"
    build(bench.model, model, said.device)
    from processors import load_processor

    processor = load_processor(model, bench.model.processor)

    def prepared(case: Case) -> Runs:
        data, steps = bench.folder / f"{case.name}.parquet", said.steps or case.usual_steps(said.device)
        build_rows(data, case.method, case.images(steps), case.questions, processor)
        return Runs(case, steps, data, sample(data, case.method, case.questions, processor))

    return [prepared(CASES[name]) for name in said.cases or CASES]


def measured(said: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of all cases, and what failed."""
    deadline = time.monotonic() + 60 * said.minutes
    with tempfile.TemporaryDirectory() as folder:
        model = (TINY if said.tiny else MODELS)[said.model]
        bench = Bench(model, said.device, Path(folder), deadline)
        all_runs = built(bench, said)
        config = json.loads((bench.folder / "model" / "config.json").read_text())
        most = peak(None) if said.device == "cpu" else None
        measure(bench, all_runs, said.rounds, said.only)
    prefix = "" if said.model == "proportions" else f"{said.model}-"
    records = [
        record(
            bench,
            runs,
            case=prefix + runs.case.name,
            model=f"{said.model}, tiny" if said.tiny else said.model,
            config=config,
            peak=most if said.device == "cpu" else runs.card and peak(runs.card),
        )
        for runs in all_runs
    ]
    return records, [failure for runs in all_runs for failure in runs.failed]


def main() -> None:
    """Measure, compare, print; exit 1 when losses differ or a variant failed."""
    said = options()
    if said.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL refuses DataParallel over several
    records, failed = measured(said)
    if wrong := [line for one in records for line in too_different(one)]:
        sys.exit("\n".join(wrong))
    for one in records:
        apart = [worst for worst in differences(one).values() if worst is not None]
        so = f"no step's loss differs by more than {max(apart):.1e}" if apart else "nothing to compare"
        print(f"{one['case']}: {one['steps']} steps, {so}")
    print("", *rendered(records), sep="\n")
    if said.results is not None:
        keep(said.results, records)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
