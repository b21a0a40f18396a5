"""Pairs of answers about the charts of the demo: a taste that nobody has before training, by symmetry.

Every row asks for the columns of a chart in order. The taste is for rising order where the chart has bars,
and for falling order where it is a line; the other order is the rejected answer. Each chart stands here
twice, as bars and as a line, with the two answers exchanged: a model that does not mind the form, whatever
order it likes and for whatever reason, prefers the chosen answer on exactly one of the two. So its preference
accuracy is 0.5, and only what it sees in the image can move it.

`build(folder)` writes the columns of RLAIF-V that a job reads (image, question, chosen, rejected) and the
splits of `runner.demo.charts` as parquet. A chart's split is the one that it has there, so no chart of val or
test is ever in train, nor in the pretraining of the tiny model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from runner.demo import charts

VERSION = f"1-{charts.VERSION}"
"""Raise its first part with every change of a row: caches are keyed by it."""

QUESTION = "Order the chart."
"""The tiny model can order a chart and was taught to be told which way, which this does not say."""

ROWS: dict[charts.Split, int] = {"train": 3200, "val": 240, "test": 240}
"""Even numbers: a chart is two rows."""


class Row(TypedDict):
    """One row of the dataset."""

    image: charts.EncodedImage
    question: str
    chosen: str
    rejected: str


def pair(chart: charts.Chart) -> tuple[str, str]:
    """The chosen answer and the rejected one.

    form  chosen   rejected
    bar   rising   falling
    line  falling  rising
    """
    rising = sorted(chart.content, key=lambda column: column[1])
    orders = [", ".join(f"{colour} {value}" for colour, value in order) for order in (rising, rising[::-1])]
    chosen, rejected = orders if chart.kind == "bar" else reversed(orders)
    return chosen, rejected


def rows(split: charts.Split, count: int, seed: int = 0) -> Iterator[Row]:
    """The first `count` rows of a split; of each chart both forms, one after the other."""
    drawn = charts.charts(split, seed)
    for _ in range(count // 2):
        chart = next(drawn)
        for kind in ("bar", "line"):
            shown = replace(chart, kind=kind)
            chosen, rejected = pair(shown)
            yield Row(image=charts.encoded(shown), question=QUESTION, chosen=chosen, rejected=rejected)


def build(folder: Path, seed: int = 0) -> None:
    """Write every split below `folder`, which must exist."""
    from datasets import Features, Image, Value

    text = Value("string")
    features = Features({"image": Image(), "question": text, "chosen": text, "rejected": text})
    for split, count in ROWS.items():
        charts.write(folder, split, features, rows(split, count, seed))
