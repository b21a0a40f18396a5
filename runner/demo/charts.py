"""The charts of the demo: drawn, asked about and written as a dataset.

A chart is two to six coloured columns, as bars or as the points of a line, on an axis from 0 to 100 with one
pixel per unit. Everything follows from a seed: the charts, their questions and every pixel, whatever fonts a
machine has (Pillow's built-in bitmap font, no anti-aliasing).

`build(folder)` writes the columns of ChartQA (image, query, label, human_or_machine) and its splits (train,
val, test) as parquet. "machine" questions read one value; "human" ones take a step more (highest, count,
comparison).

A chart's split is a hash of its colours and values, so no chart of val or test, in whatever form and with
whatever title, is ever in train, nor in the pretraining of the tiny model. This module does not cache (see
`runner.demo`) and does not grade answers.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from datasets import Features

VERSION = "1"
"""Raise it with every change of a row or a pixel: caches are keyed by it."""

Kind = Literal["bar", "line"]
Split = Literal["train", "val", "test"]

SIZE = 128
"""Side of a chart in pixels: one tile of the tiny model."""
ROWS: dict[Split, int] = {"train": 8000, "val": 320, "test": 320}
QUESTIONS_PER_CHART: dict[Split, int] = {"train": 2, "val": 1, "test": 1}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (44, 160, 44),
    "orange": (255, 150, 14),
    "purple": (150, 60, 190),
    "black": (20, 20, 20),
}
VALUES = range(10, 100, 5)
TITLES = ("Sales", "Visits", "Rain", "Prices", "Scores", "Exports")

LEFT, BASE = 26, 121
"""Pixel column where the plot begins, and pixel row of value 0; value v is at row BASE - v."""
PLOT_WIDTH = 100
_INK, _GRID = (70, 70, 70), (225, 225, 225)
_MARKER = 4
"""A line chart's point is a square of 2 * _MARKER + 1 pixels, centred on its value."""

HUMAN_OR_MACHINE = ("human", "machine")


@dataclass(frozen=True)
class Chart:
    """One chart. `colours` and `values` run from left to right, both without repetition."""

    kind: Kind
    title: str
    colours: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def content(self) -> tuple[tuple[str, int], ...]:
        """What makes two charts the same one: the columns, whatever the form or the title."""
        return tuple(zip(self.colours, self.values, strict=True))

    @property
    def noun(self) -> str:
        """What the questions call a column."""
        return "bar" if self.kind == "bar" else "point"


@dataclass(frozen=True)
class Question:
    query: str
    answer: str
    source: Literal["human", "machine"]


EncodedImage = dict[str, bytes | None]
"""`bytes` and `path`, as `datasets.Image` takes them."""


class Row(TypedDict):
    """One row of the dataset, in ChartQA's columns."""

    image: EncodedImage
    query: str
    label: list[str]
    human_or_machine: str


def sample(rng: random.Random) -> Chart:
    """A chart of any split."""
    count = rng.randint(2, len(COLOURS))
    return Chart(
        kind=rng.choice(("bar", "line")),
        title=rng.choice(TITLES),
        colours=tuple(rng.sample(list(COLOURS), count)),
        values=tuple(rng.sample(VALUES, count)),
    )


def split_of(chart: Chart) -> Split:
    """The only split that a chart may occur in: of 10 contents one is test, one val, eight train."""
    bucket = hashlib.sha256(repr(chart.content).encode()).digest()[0] % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def centres(count: int) -> list[int]:
    """Pixel columns of the middles of `count` columns."""
    return [LEFT + (2 * index + 1) * PLOT_WIDTH // (2 * count) for index in range(count)]


def draw(chart: Chart) -> Image.Image:
    """The chart as an RGB image of SIZE x SIZE pixels."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    pen.fontmode = "1"
    font = ImageFont.load_default_imagefont()
    for value in (0, 25, 50, 75, 100):
        pen.line((LEFT, BASE - value, LEFT + PLOT_WIDTH, BASE - value), fill=_GRID)
    for value in (0, 50, 100):
        text = str(value)
        pen.text((LEFT - 3 - 6 * len(text), BASE - value - 5), text, fill=_INK, font=font)
    pen.text((LEFT + PLOT_WIDTH // 2 - 3 * len(chart.title), 3), chart.title, fill=_INK, font=font)
    middles = centres(len(chart.values))
    tops = [BASE - value for value in chart.values]
    if chart.kind == "line":
        pen.line(list(zip(middles, tops, strict=True)), fill=(150, 150, 150))
    half = PLOT_WIDTH * 3 // (10 * len(chart.values))
    for middle, top, colour in zip(middles, tops, chart.colours, strict=True):
        if chart.kind == "bar":
            box = (middle - half, top, middle + half, BASE - 1)
        else:
            box = (middle - _MARKER, top - _MARKER, middle + _MARKER, top + _MARKER)
        pen.rectangle(box, fill=COLOURS[colour])
    pen.line((LEFT, BASE - 100, LEFT, BASE, LEFT + PLOT_WIDTH, BASE), fill=_INK)
    return image


def encoded(chart: Chart) -> EncodedImage:
    """The chart as a PNG."""
    buffer = io.BytesIO()
    draw(chart).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def ask(chart: Chart, rng: random.Random) -> Question:
    """One question about a chart, with its answer. Half of them read a value, half need a step more."""
    by_colour = dict(chart.content)
    noun = chart.noun
    if rng.random() < 0.5:
        colour = rng.choice(chart.colours)
        return Question(f"What is the value of the {colour} {noun}?", str(by_colour[colour]), "machine")
    highest = max(by_colour, key=by_colour.__getitem__)
    lowest = min(by_colour, key=by_colour.__getitem__)
    first, second = rng.sample(chart.colours, 2)
    query, answer = rng.choice(
        (
            (f"Which {noun} is the highest?", highest),
            (f"Which {noun} is the lowest?", lowest),
            ("What is the highest value?", str(by_colour[highest])),
            (f"How many {noun}s are there?", str(len(by_colour))),
            (f"Is {first} higher than {second}?", "Yes" if by_colour[first] > by_colour[second] else "No"),
        )
    )
    return Question(query, answer, "human")


def charts(split: Split, seed: int = 0) -> Iterator[Chart]:
    """The charts of a split, endlessly, no two with the same content."""
    rng = random.Random(f"{VERSION}/{split}/{seed}")
    seen: set[tuple[tuple[str, int], ...]] = set()
    while True:
        chart = sample(rng)
        if split_of(chart) == split and chart.content not in seen:
            seen.add(chart.content)
            yield chart


def rows(split: Split, count: int, seed: int = 0) -> Iterator[Row]:
    """The first `count` rows of a split. A chart of train carries different questions, as in ChartQA."""
    rng = random.Random(f"{VERSION}/{split}/{seed}/questions")
    made = 0
    for chart in charts(split, seed):
        image = encoded(chart)
        asked: set[Question] = set()
        while len(asked) < QUESTIONS_PER_CHART[split]:
            question = ask(chart, rng)
            if question in asked:
                continue
            asked.add(question)
            if made == count:
                return
            made += 1
            yield Row(
                image=image,
                query=question.query,
                label=[question.answer],
                human_or_machine=question.source,
            )


def build(folder: Path, seed: int = 0) -> None:
    """Write every split below `folder`, which must exist."""
    # Imported here: `datasets` takes a second, and drawing alone does not need it.
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "image": ImageFeature(),
            "query": Value("string"),
            "label": List(Value("string")),
            "human_or_machine": ClassLabel(names=list(HUMAN_OR_MACHINE)),
        }
    )
    for split, count in ROWS.items():
        write(folder, split, features, rows(split, count, seed))


def write(folder: Path, split: Split, features: Features, made: Iterable[Mapping[str, Any]]) -> None:
    """Write one split as `data/<split>-00000-of-00001.parquet` below `folder`."""
    from datasets import Dataset

    columns: dict[str, list[object]] = {name: [] for name in features}
    for row in made:
        for name, column in columns.items():
            column.append(row[name])
    (folder / "data").mkdir(exist_ok=True)
    table = Dataset.from_dict(columns, features=features)
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
