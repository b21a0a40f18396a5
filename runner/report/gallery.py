"""The table of predictions as a page shows it: which rows, and their images as far as there is room. Pure."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runner.report import judge
from runner.report.judge import Became, Prediction
from runner.report.metrics import named
from runner.report.read import Run

ROWS = 500
"""Predictions in a page: all of them are in evaluation/*.predictions.jsonl."""

IMAGE_BYTES = 3_600_000
"""Of images in a page, as they stand in it: with the rest it stays under 5 MB."""

LONGEST = 1_200
"""Characters of one text of a prediction."""

ORDER: tuple[Became, ...] = ("broken", "wrong", "fixed", "right")


@dataclass(frozen=True)
class Picture:
    """An image of a row. What several rows show is in the page once."""

    id: str
    """Of the element that holds the content."""
    address: str | None
    """The content itself; None where another element holds it."""


@dataclass(frozen=True)
class Row:
    """A prediction and its images, as far as they have room in a page."""

    prediction: Prediction
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Predictions:
    """The table of predictions."""

    rows: tuple[Row, ...]
    total: int
    counts: Mapping[Became, int]
    """Over all rows."""
    left_out: int
    """Images that have no room."""
    pairs: bool
    metric: str


def table(run: Run, metric: str) -> Predictions:
    """All predictions of a run, judged by a metric."""
    every = judge.predictions(run.before, run.after, metric)
    album = _Album(run.images)
    rows = tuple(Row(one, tuple(album.pictures(one.images))) for one in every[:ROWS])
    counts = Counter(one.became for one in every)
    return Predictions(
        rows=rows,
        total=len(every),
        counts={became: counts[became] for became in ORDER},
        left_out=len(album.left_out),
        pairs=any(one.rejected is not None for one in every),
        metric=named(metric),
    )


class _Album:
    """Puts images into a page, each once, while there is room."""

    def __init__(self, images: Mapping[str, bytes]) -> None:
        self._images = images
        self._room = IMAGE_BYTES
        self._there: dict[str, str] = {}
        self.left_out: set[str] = set()

    def pictures(self, names: tuple[str, ...]) -> Iterator[Picture]:
        """Those of one row."""
        for name in names:
            if name in self._there:
                yield Picture(self._there[name], None)
            elif name in self._images:
                address = "data:image/webp;base64," + base64.b64encode(self._images[name]).decode()
                if len(address) > self._room:
                    self.left_out.add(name)
                    continue
                self._room -= len(address)
                self._there[name] = f"image-{len(self._there)}"
                yield Picture(self._there[name], address)


def cut(said: str | None, longest: int = LONGEST) -> str:
    """A text of a prediction, no longer than a page can bear."""
    said = said or ""
    return said if len(said) <= longest else f"{said[:longest]}…"
