"""Small copies of evaluated images: which, how large, each once; and that they come and go with the run."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner.supervisor.evaluation import join_images
from runner.train.data.rows import Rows
from runner.train.evaluation import thumbnails
from runner.train.evaluation.thumbnails import ARCHIVE, LONG_EDGE, illustrated
from tests.samples import chartqa, png, rows, smolvlm, source

PICTURES = [png(0, 900, 300), png(1, 40, 30), png(0, 900, 300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = chartqa(tmp_path_factory.mktemp("charts") / "charts", PICTURES)
    return rows(smolvlm(), (source(), folder), name="eval")


def records(made: Rows) -> list[dict[str, Any]]:
    return [{"row": row, "prediction": "x"} for row in made.dataset["row"][:]]


def kept(folder: Path) -> dict[str, Image.Image]:
    with zipfile.ZipFile(folder / ARCHIVE) as archive:
        return {name: Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()}


def named(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.webp"


def test_each_image_is_there_once_small_and_named_in_its_records(made: Rows, tmp_path: Path) -> None:
    found = illustrated(records(made), made, tmp_path)
    assert [one["images"] for one in found] == [[named(data)] for data in PICTURES]
    assert [{**one, "images": 0} for one in found] == [{**one, "images": 0} for one in records(made)]
    images = kept(tmp_path)
    assert set(images) == {named(PICTURES[0]), named(PICTURES[1])}
    assert {name: image.size for name, image in images.items()} == {
        named(PICTURES[0]): (LONG_EDGE, LONG_EDGE // 3),
        named(PICTURES[1]): (40, 30),
    }
    assert {image.format for image in images.values()} == {"WEBP"}


def test_a_later_evaluation_finds_them_there(made: Rows, tmp_path: Path) -> None:
    illustrated(records(made), made, tmp_path)
    archive = tmp_path / ARCHIVE
    before, at = archive.read_bytes(), archive.stat().st_mtime_ns
    illustrated(records(made), made, tmp_path)
    assert archive.stat().st_mtime_ns == at
    archive.write_bytes(before[:100])
    illustrated(records(made), made, tmp_path)
    assert archive.read_bytes() == before, "damaged, and made again to the same bytes"


def test_only_the_first_rows_have_them(made: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "ROWS", 1)
    found = illustrated(records(made), made, tmp_path)
    assert ["images" in one for one in found] == [True, False, False]
    assert list(kept(tmp_path)) == [named(PICTURES[0])]


def test_an_evaluation_of_another_adapter_adds_its_own(made: Rows, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    illustrated(records(made)[:1], made, run)
    illustrated(records(made), made, other)
    join_images(other / ARCHIVE, run / ARCHIVE)
    assert set(kept(run)) == {named(PICTURES[0]), named(PICTURES[1])}
    join_images(other / ARCHIVE, run / ARCHIVE)
    assert len(kept(run)) == 2, "there was none"
