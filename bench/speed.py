"""Our training steps against plain TRL's: the same model, rows, order and seed, losses compared before speed.

Every variant of every case (`speed_cases`) trains in a process of its own, ours as the supervisor starts it,
TRL's as a course's script does; plain TRL takes the rows of each step as our run took them. A round runs each
variant once, in turn; the rounds after the first run what the headline needs, plain TRL and all levers, while
time is left. When the losses of a step differ by more than a limit, no speed is printed and the command ends
with 1. The table has the samples per second by the median step, MFU (`speed_flops`), peak memory, and the
share of a step that waits for data.

On a CPU: SmolVLM's proportions, 13 tiles and about 1,100 tokens of prompt, float32, so that the limit is 1e-5;
part of the ratio belongs to CPUs: on a GPU, TRL too projects only the tokens that carry loss through the head.
On a GPU: `--device cuda --model smolvlm` or `qwen2vl-7b`, real sizes with random weights, 4-bit, bfloat16, where
equal sums round differently. It ends by itself after `--minutes`; what did not fit is listed as not run.

Run as `make bench` or `python bench/speed.py [--help]`. `--results bench/results` keeps what was measured; the
acceptance run is `--steps 20 --minutes 60`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for both, as the supervisor sets it for trainers

import speed_table
from attempt import Failed, trainer
from speed_cases import ALL, CASES, OFF, PLAIN, Case, Variant, job, spec
from speed_flops import Sample, flops, peak, weights
from speed_models import MODELS, TINY, Model
from speed_rows import build_rows, sample

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
"""Largest difference of a step's loss, by dtype. In bfloat16 equal sums round differently, and a training
goes its own way from there: this tells another loss from the same one, not more."""
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
END = 10
"""Seconds kept for the end of the program."""
NO_TIME = "not run: no time was left"


@dataclass(frozen=True)
class Bench:
    """One command: what is trained, where, and until when."""

    model: Model
    device: str
    folder: Path
    """Of the model, the rows and the runs."""
    deadline: float
    """By `time.monotonic`."""

    @property
    def left(self) -> float:
        """Seconds for training."""
        return self.deadline - END - time.monotonic()


@dataclass
class Runs:
    """What was measured of a case, while it is measured."""

    case: Case
    steps: int
    data: Path
    sample: Sample
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By variant."""
    why: dict[str, str] = field(default_factory=dict)
    """Why a variant was not run."""
    longest: float = 0.0
    """Seconds of its slowest process."""
    order: list[list[int]] | None = None
    """Rows of each step."""
    card: str | None = None


def ours(bench: Bench, runs: Runs, variant: Variant, turn: int) -> dict[str, Any]:
    """One round of one of our variants."""
    folder = bench.folder / f"{runs.case.name}-{variant.name.replace(' ', '-')}-{turn}"
    model = bench.folder / "model"
    asked = job(runs.case, variant, bench.model, runs.steps, model, runs.data)
    found = trainer(folder, asked, model, runs.data, bench.left)
    order = [step["ids"] for step in found.steps]
    runs.order = runs.order or order
    if order != runs.order:
        raise Failed(f"{runs.case.name}, {variant.name}: its steps took other rows than those of the first run")
    return {
        "losses": [step["loss"] for step in found.steps],
        "seconds": [step["seconds"] for step in found.steps],
        "data_seconds": [step.get("data_seconds") for step in found.steps],
        "before_seconds": found.before_seconds,
        **found.process,
    }


def plain(bench: Bench, runs: Runs) -> dict[str, Any]:
    """One round of `bench/plain_trl.py`."""
    if runs.order is None:
        raise Failed("plain TRL needs the order of a run of ours, and none went well")
    model = bench.folder / "model"
    file = bench.folder / "plain.json"
    said = spec(runs.case, bench.model, runs.steps, model, runs.data, runs.order, bench.device)
    file.write_text(json.dumps(said))
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "bench" / "plain_trl.py"), str(file)],
            capture_output=True,
            text=True,
            cwd=bench.folder,
            timeout=bench.left,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed("plain TRL took too long") from error
    if done.returncode != 0:
        raise Failed(f"plain TRL failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, **result.pop("process")}


def one(bench: Bench, runs: Runs, name: str, variant: Variant | None, turn: int) -> None:
    """Run one variant once, or note why it was not. The first round runs everything that time allows."""
    if variant is not None and variant.missing:
        runs.why[name] = f"not run: {variant.package} is not installed"
        return
    if bench.left < runs.longest:
        runs.why.setdefault(name, NO_TIME)
        return
    print(f"{runs.case.name}: {name}, round {turn + 1}", flush=True)
    began = time.monotonic()
    try:
        found = plain(bench, runs) if variant is None else ours(bench, runs, variant, turn)
    except Failed as error:
        late = bench.left <= 0
        runs.why[name] = NO_TIME if late else f"failed: {str(error).strip().splitlines()[-1]}"
        print(NO_TIME if late else error, flush=True)
        return
    runs.longest = max(runs.longest, time.monotonic() - began)
    runs.card = found.pop("card")
    runs.rounds.setdefault(name, []).append(found)


def order_of(case: Case, device: str) -> list[tuple[str, Variant | None]]:
    """The variants of a case, what the headline needs first: where time runs out, levers alone are missing."""
    by_name: dict[str, Variant | None] = {one.name: one for one in case.variants(device)}
    first, *others = by_name
    return [(first, by_name[first]), (PLAIN, None), *((name, by_name[name]) for name in others)]


def measure(bench: Bench, all_runs: list[Runs], rounds: int, only: list[str] | None) -> None:
    """Fill the runs."""
    for turn in range(rounds):
        for runs in all_runs:
            for name, variant in order_of(runs.case, bench.device):
                wanted = name in only if only else turn == 0 or name in (ALL, PLAIN)
                if wanted:
                    one(bench, runs, name, variant, turn)


def record(
    bench: Bench, runs: Runs, name: str, prefix: str, config: dict[str, Any], most: dict[str, Any] | None
) -> dict[str, Any]:
    """What is kept of a case: a file of bench/results.

    Args:
        prefix: of the case's name.
    """
    case = runs.case
    names = [PLAIN, OFF, *(name for name in dict(order_of(case, bench.device)) if name not in (PLAIN, OFF, ALL))]
    shape = weights(config)
    return {
        "case": prefix + case.name,
        "model": name,
        "dtype": bench.model.dtype,
        "quantization": bench.model.quantization,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "card": runs.card},
        "versions": {"python": platform.python_version(), **{one: version(one) for one in PACKAGES}},
        "revision": _revision(),
        "command": " ".join(["python", "bench/speed.py", *sys.argv[1:]]),
        "tolerance": TOLERANCE[bench.model.dtype],
        "steps": runs.steps,
        "steps_per_epoch": runs.steps // case.epochs,
        "samples_per_step": case.questions,
        "sample": asdict(runs.sample),
        "flops": {
            "first": flops(shape, runs.sample, case.method, reference=True),
            "later": flops(shape, runs.sample, case.method, reference=False),
        },
        "peak": most,
        "variants": [
            {"name": name, "not_run": runs.why.get(name), "rounds": runs.rounds.get(name, [])}
            for name in [*names, ALL]
            if name in runs.why or name in runs.rounds
        ],
    }


def _cpu() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _revision() -> str | None:
    """Of the code; None outside a repository, as where only the files were copied to."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def keep(folder: Path, records: list[dict[str, Any]]) -> None:
    """A file for each record: `<case>-<hardware>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in records:
        machine = one["hardware"]
        where = machine["card"] or f"cpu {machine['cores']} cores {machine['cpu']}"
        slug = "-".join("".join(c if c.isalnum() else " " for c in where.lower()).split())
        (folder / f"{one['case']}-{slug}.json").write_text(json.dumps(one, indent=1) + "\n", "utf-8")


def prepared(bench: Bench, case: Case, steps: int, processor: Any) -> Runs:
    """A case with its rows."""
    data = bench.folder / f"{case.name}.parquet"
    build_rows(data, case.method, case.images(steps), case.questions, processor)
    return Runs(case, steps, data, sample(data, case.method, case.questions, processor))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="proportions on a CPU, smolvlm on a GPU by default")
    parser.add_argument("--steps", type=int, help="optimizer steps of every case")
    parser.add_argument("--rounds", type=int, default=2, help="at most so many")
    parser.add_argument("--minutes", type=float, default=9.5, help="when no process is begun any more")
    parser.add_argument("--only", action="append", metavar="VARIANT", help="may be repeated")
    parser.add_argument("--tiny", action="store_true", help="the smallest model of that architecture")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keep what was measured there")
    said = parser.parse_args()
    if unknown := set(said.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    return said


def main() -> None:
    """Measure, compare, print; exit 1 when losses differ or a variant failed."""
    said = options()
    began = time.monotonic()
    name = said.model or ("proportions" if said.device == "cpu" else "smolvlm")
    if said.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL refuses DataParallel over several
    with tempfile.TemporaryDirectory() as folder:
        models = TINY if said.tiny else MODELS
        bench = Bench(models[name], said.device, Path(folder), began + 60 * said.minutes)
        builder = [sys.executable, str(ROOT / "bench" / "speed_models.py"), name, str(bench.folder / "model")]
        subprocess.run([*builder, "--device", said.device, *["--tiny"] * said.tiny], check=True)
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(
            bench.folder / "model", backend="pil", **bench.model.processor
        )
        chosen = [case for case in CASES.values() if not said.cases or case.name in said.cases]
        all_runs = [prepared(bench, case, said.steps or case.steps, processor) for case in chosen]
        config = json.loads((bench.folder / "model" / "config.json").read_text())
        most = peak(None) if said.device == "cpu" else None
        measure(bench, all_runs, said.rounds, said.only)
    records = []
    for runs in all_runs:
        most = peak(runs.card) if said.device != "cpu" else most
        prefix = "" if name == "proportions" else f"{name}-"
        label = f"{name}, tiny" if said.tiny else name
        records.append(record(bench, runs, label, prefix, config, most))
    if wrong := [line for one in records for line in speed_table.too_different(one)]:
        sys.exit("\n".join(wrong))
    print("losses are equal: " + ", ".join(f"{one['case']} over {one['steps']} steps" for one in records))
    print(*speed_table.rendered(records), sep="\n")
    if said.results is not None:
        keep(said.results, records)
    if failed := [why for runs in all_runs for why in runs.why.values() if why.startswith("failed")]:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
