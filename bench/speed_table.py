"""The table of the speed bench, from what was measured: bench/results/*.json -> docs/speed.md.

A file is one case on one machine, as `speed.py --results bench/results` writes it; nothing else writes there.
`differences` judges the losses of a file, `table` renders one that it has passed.

Run as `python bench/speed_table.py` to put the table of the files into docs/speed.md.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_cases import OFF, PLAIN

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- measured: bench/results -->", "<!-- end -->"
HEAD = [
    "| case | | samples/s | against TRL | losses apart | MFU | peak memory, GiB | waits for data |",
    "|---|---|---:|---:|---:|---:|---:|---:|",
]

Record = dict[str, Any]
Round = dict[str, Any]


@dataclass(frozen=True)
class View:
    """Steps of a record that a part of the table is about."""

    name: str
    steps: slice
    flops: float
    """Of one sample."""
    first: bool
    """Whether what a variant does before its first step is done for these."""


def views(record: Record) -> list[View]:
    """The first step of a process warms up and is left out; a second epoch is a part of its own."""
    name, epoch = record["case"], record["steps_per_epoch"]
    first = View(name, slice(1, epoch), record["flops"]["first"], True)
    if epoch == record["steps"]:
        return [first]
    return [first, View(f"{name}-second", slice(epoch, None), record["flops"]["later"], False)]


def differences(record: Record) -> dict[str, float | None]:
    """The largest difference of a step's loss to plain TRL's first round, of each variant that was run; None
    for all where plain TRL was not.

    Raises:
        ValueError: two runs took another number of steps.
    """
    rounds = {one["name"]: one["rounds"] for one in record["variants"] if one["rounds"]}
    if PLAIN not in rounds:
        return dict.fromkeys(rounds)
    wanted = rounds[PLAIN][0]["losses"]
    return {name: max(_apart(one["losses"], wanted) for one in runs) for name, runs in rounds.items()}


def _apart(losses: list[float], wanted: list[float]) -> float:
    """The largest difference of two runs' losses; infinite where one of them is no number."""
    apart = [abs(a - b) for a, b in zip(losses, wanted, strict=True)]
    return max(math.inf if math.isnan(one) else one for one in apart)


def too_different(record: Record) -> list[str]:
    """The variants whose losses are not plain TRL's, in words."""
    limit = record["tolerance"]
    return [
        f"{record['case']}, {name}: a step's loss differs from plain TRL's by {worst:.1e}, over {limit:.0e}"
        for name, worst in differences(record).items()
        if worst is not None and worst > limit
    ]


def samples_per_second(record: Record, name: str, view: View) -> float | None:
    """By the median step of all rounds; None where there is none.

    What a variant does between the beginning of training and its first step, beyond what ours takes with
    every lever off, is spread over the steps of its first epoch: a lever may work ahead, but not for free.
    """
    runs = _rounds(record, name)
    seconds = [second for one in runs for second in one["seconds"][view.steps]]
    if not seconds:
        return None
    ahead = 0.0
    if view.first and name != PLAIN and (idle := _rounds(record, OFF)):
        before, usual = (statistics.median(one["before_seconds"] for one in some) for some in (runs, idle))
        ahead = max(0.0, before - usual) / record["steps_per_epoch"]
    rate: float = record["samples_per_step"] / (statistics.median(seconds) + ahead)
    return rate


def _rounds(record: Record, name: str) -> list[Round]:
    return next((one["rounds"] for one in record["variants"] if one["name"] == name), [])


def _waits(runs: list[Round], view: View) -> float | None:
    """The share of the steps that passes before their data is there; None where a run did not say."""
    if any(None in one["data_seconds"] for one in runs):
        return None
    waited, all_of_it = (
        sum(second for one in runs for second in one[key][view.steps]) for key in ("data_seconds", "seconds")
    )
    return waited / all_of_it


def table(record: Record) -> list[str]:
    """The rows of one record; Markdown. A dash is what is not known."""
    lines = []
    apart = differences(record)
    for view in views(record):
        base = samples_per_second(record, PLAIN, view)
        for variant in record["variants"]:
            name, runs = variant["name"], variant["rounds"]
            rate = samples_per_second(record, name, view)
            if rate is None:
                lines.append(f"| {view.name} | {name} | {variant['not_run'] or 'too few steps'} | | | | | |")
                continue
            peak = None if record["peak"] is None else record["peak"]["flops"]
            cells = [
                f"{rate:.3g}",
                _cell(base and rate / base, "{:.2f}x"),
                _cell(apart[name], "{:.1e}"),
                _cell(peak and rate * view.flops / peak, "{:.1%}"),
                _memory(runs),
                _cell(_waits(runs, view), "{:.1%}"),
            ]
            lines.append(f"| {view.name} | {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _memory(runs: list[Round]) -> str:
    """Peak; on a GPU allocated, and what the allocator held for it."""
    peak = f"{max(one['peak_bytes'] for one in runs) / 2**30:.2f}"
    held = [one["reserved_bytes"] for one in runs]
    return peak if None in held else f"{peak} ({max(held) / 2**30:.2f} reserved)"


def caption(record: Record) -> str:
    """What the rows of a record have in common, for a person."""
    machine, row = record["hardware"], record["sample"]
    where = machine["card"] or f"{machine['cpu']}, {machine['cores']} cores"
    answers = " and ".join(f"{tokens:.0f}" for tokens in row["answers"])
    peak = record["peak"]
    most = "peak unknown" if peak is None else f"peak {peak['flops'] / 1e12:.3g} TFLOP/s ({peak['source']})"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"{record['case']} of {record['model']} on {where}: {record['steps']} steps of "
        f"{record['samples_per_step']} samples, {row['images']} tiles of {row['patches']} patches, a "
        f"prompt of {row['prompt']:.0f} tokens and {answers} beyond it, {record['dtype']}; {most}; "
        f"{versions}; {record['date']}, revision {record['revision']}, `{record['command']}`."
    )


def read(folder: Path = RESULTS) -> list[Record]:
    """The records that are kept, by name."""
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]


def rendered(records: list[Record]) -> list[str]:
    """All records: one table for every model and machine, and under it what its rows have in common."""
    if not records:
        return ["Nothing is kept yet."]
    lines: list[str] = []
    for key in dict.fromkeys(map(_place, records)):
        some = [record for record in records if _place(record) == key]
        lines += ["", *HEAD, *(line for record in some for line in table(record)), ""]
        lines += [f"* {caption(record)}" for record in some]
    return lines[1:]


def _place(record: Record) -> tuple[str, str]:
    return record["model"], json.dumps(record["hardware"])


def page(text: str, records: list[Record]) -> str:
    """docs/speed.md with the table of these records."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *rendered(records), "", END + after])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), read()), "utf-8")
