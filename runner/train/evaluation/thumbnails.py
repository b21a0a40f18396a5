"""Small copies of the images that predictions are about, so that a report can show them.

    evaluation/images.zip    <SHA-256 of the stored image>.webp, once for each image

One archive and not a file each: what a run ends with is sent to its store object by object. Only the first
`ROWS` rows of an evaluation get them. Nothing random is drawn, and nothing that trains or evaluates reads
them.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.durable import disk
from runner.train.data import images
from runner.train.data.rows import Rows

ARCHIVE = "images.zip"

ROWS = 200
"""Rows of an evaluation whose images are kept."""

LONG_EDGE = 384
"""Pixels: the labels of a chart can be read, and 200 of them are a few megabytes."""

QUALITY = 60
"""Of WebP."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every member, so that the same images are the same archive."""


def illustrated(records: Sequence[Mapping[str, Any]], rows: Rows, folder: Path) -> list[dict[str, Any]]:
    """The records of an evaluation, the first of them with `images`: names in the archive, one an image.

    Args:
        records: one a row of `rows`, in its order.
        folder: where the archive is, or will be.
    """
    archive = folder / ARCHIVE
    kept = _kept(archive)
    before = len(kept)
    named = []
    for record, row in zip(records, rows.dataset.select(range(min(ROWS, len(records)))), strict=False):
        names = [_added(stored, kept) for stored in row["images"]]
        named.append({**record, "images": [name for name in names if name is not None]})
    if len(kept) > before:
        _write(archive, kept)
    return [*named, *map(dict, records[len(named) :])]


def _added(stored: images.Stored, kept: dict[str, bytes]) -> str | None:
    """The name of an image, which is kept from now on; None of one that is no longer there."""
    try:
        data = images.stored_bytes(stored)
        name = f"{hashlib.sha256(data).hexdigest()}.webp"
        if name not in kept:
            image, _ = images.open_image(images.Stored(bytes=data, path=stored["path"]))
            image.thumbnail((LONG_EDGE, LONG_EDGE))
            file = io.BytesIO()
            image.save(file, "WEBP", quality=QUALITY)
            kept[name] = file.getvalue()
    except images.BadImage:  # it was whole when the rows were checked, and the evaluation has seen it
        return None
    return name


def _kept(archive: Path) -> dict[str, bytes]:
    """What an earlier evaluation left; nothing of an archive that is damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            return {name: file.read(name) for name in file.namelist()}
    except (FileNotFoundError, zipfile.BadZipFile):
        return {}


def _write(archive: Path, kept: Mapping[str, bytes]) -> None:
    """Replace the archive, whole."""
    temporary = archive.with_suffix(".tmp")
    with disk("keep small copies of the evaluated images", archive):
        archive.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(temporary, "w") as file:  # stored: WebP does not shrink
            for name, data in kept.items():
                file.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        temporary.replace(archive)
