"""A source of the job as tables: opened by `datasets`, its columns found, its images one list per row.

`open_source` reads whatever `datasets.load_dataset` reads without a network: a snapshot of a hub repository,
a folder, a .parquet, .jsonl, .json or .csv file. `image_lists` gives every way of storing images one shape
without touching their bytes. What rows mean is `runner.train.data.formats`', what images hold
`runner.train.data.images`'.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, LargeList, List, load_dataset_builder
from datasets.builder import DatasetBuilder
from datasets.exceptions import DatasetsError

from runner.errors import DataError
from runner.manifest import ROLES, Source

FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}

IMAGES = List(Image(decode=False))
"""The type of the images column: undecoded `{bytes, path}`, any number in a row."""

OPTIONAL_ROLES = frozenset({"group"})
IMAGE_ROLES = ("image", "images")
NEED_IMAGES = frozenset({"vqa", "caption", "preference"})
"""Formats whose rows ask about an image. A source of another format may be all text."""

_STORED = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@dataclass(frozen=True)
class Opened:
    """A source, ready to be read."""

    key: str
    """Where the job names it: `datasets.train[0]`."""
    label: str
    """What people call it: `HuggingFaceM4/ChartQA[train[:10%]]`."""
    table: Dataset
    """Its rows, all columns, nothing decoded."""
    image: str | None
    """The column of its images; None: it has none, its rows are text."""
    columns: dict[str, str]
    """Role -> column, for the other roles of its format."""
    folder: str
    """Base of relative image paths."""

    def row(self, number: int) -> str:
        """The name of a row, counted from 0 within the split as the job writes it."""
        return f"{self.label} row {number}"

    def classes(self) -> dict[str, list[str]]:
        """Column -> names of its classes, for the columns that hold class numbers."""
        found: dict[str, list[str]] = {}
        for column in self.columns.values():
            feature = self.table.features[column]
            inner = feature.feature if isinstance(feature, List | LargeList) else feature
            if isinstance(inner, ClassLabel):
                found[column] = list(inner.names)
        return found


def open_source(source: Source, location: str, key: str) -> Opened:
    """Open one source.

    Args:
        location: folder or file of the source on this machine.
        key: where the job names it, for messages.

    Raises:
        DataError: nothing readable is there, or no such split, column or image folder.
    """
    path = Path(location)
    name = source.path if source.name is None else f"{source.path}:{source.name}"
    builder = _builder(source, path, f"{key}.path", name)
    label = f"{name}[{source.split}]"
    try:
        # Not upstream's own check of row counts: cards are often stale, and every row is checked here anyway.
        builder.download_and_prepare(verification_mode="no_checks")
    except (DatasetsError, pa.ArrowException, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{key}.path: cannot read {name} in {location}: {_line(reason)}") from error
    try:
        table = builder.as_dataset(split=source.split)
    except (ValueError, AssertionError) as error:
        splits = sorted(map(str, builder.info.splits or ()))
        raise DataError(
            f"{key}.split: cannot take {source.split!r} of {name}: {_line(error)}"
            f"{_meant(_first(source.split), splits)}; the splits there are: {', '.join(splits)}"
        ) from error
    image, columns = _columns(source, key, label, table)
    return Opened(key, label, table, image, columns, _image_folder(source, path, key))


def image_lists(column: pa.ChunkedArray, folder: str, what: str) -> pa.ChunkedArray:
    """A column of images as lists of undecoded `{bytes, path}`; the bytes are not copied.

        what a cell holds                       what it becomes
        Image, or a struct of bytes and path    [it]
        text: a path                            [{bytes: null, path: folder/path}]
        bytes                                   [{bytes, path: null}]
        a list of any of these                  one entry each
        null                                    [null], or [] where cells are lists

    Args:
        folder: base of the relative paths of images that have no bytes.
        what: names the column in the error.

    Raises:
        DataError: the column holds something else.
    """
    chunks = [_image_list(chunk, folder, what) for chunk in column.chunks]
    return pa.chunked_array(chunks, type=pa.list_(_STORED))


def image_counts(lists: pa.ChunkedArray) -> list[int]:
    """Images per row of what `image_lists` returns; `[null]` counts as none."""
    counts: list[int] = []
    for chunk in lists.chunks:
        lengths = pc.list_value_length(chunk).to_pylist()
        nulls = chunk.values.is_valid().to_pylist() if chunk.values.null_count else None
        start = chunk.offsets[0].as_py()
        for length in lengths:
            alone_and_null = nulls is not None and length == 1 and not nulls[start]
            counts.append(0 if alone_and_null else length)
            start += length
    return counts


def no_images(rows: int) -> pa.ChunkedArray:
    """What `image_lists` returns for rows of text."""
    none = pa.ListArray.from_arrays(pa.array([0] * (rows + 1), pa.int32()), pa.array([], _STORED))
    return pa.chunked_array([none])


def shown_images(lists: pa.ChunkedArray, shown: Sequence[Sequence[int]]) -> pa.ChunkedArray:
    """The images of every row in the order in which it shows them.

    The bytes of a chunk are copied only if a row of it shows them in another order than the column's.

    Args:
        lists: what `image_lists` returns.
        shown: of every row, which of its images, in order; empty for a row that is not used.
    """
    chunks = []
    start = 0
    for chunk in lists.chunks:
        orders = shown[start : start + len(chunk)]
        in_order = all(list(order) == list(range(len(order))) for order in orders)
        chunks.append(chunk if in_order else _reordered(chunk, orders))
        start += len(chunk)
    return pa.chunked_array(chunks, type=lists.type)


# --- opening ---


def _builder(source: Source, path: Path, key: str, name: str) -> DatasetBuilder:
    try:
        if path.is_file():
            if path.suffix not in FILE_BUILDERS:
                raise DataError(
                    f"{key}: cannot read {path}: a file is one of {', '.join(FILE_BUILDERS)}; for others, "
                    "put them in a folder that datasets.load_dataset reads"
                )
            return load_dataset_builder(FILE_BUILDERS[path.suffix], data_files={"train": str(path)})
        if not path.is_dir():
            raise DataError(f"{key}: {path} is neither a folder nor a file")
        builder = load_dataset_builder(str(path), name=source.name, data_files=source.data_files)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(f"{key}: cannot read {name} in {path}: {_line(error)}") from error
    tables = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix in FILE_BUILDERS and not file.name.startswith("metadata.")
    )
    if builder.name == "imagefolder" and tables:
        # datasets goes by the most frequent ending, so it would read the pictures and not the table about
        # them.
        raise DataError(
            f"{key}: {path} holds both pictures and {', '.join(tables)}; remedy: name the file, "
            f"path: {Path(source.path) / tables[0]}"
        )
    return builder


def _columns(source: Source, key: str, label: str, table: Dataset) -> tuple[str | None, dict[str, str]]:
    """The image column, and role -> column for the rest."""
    there = list(table.column_names)
    roles = {role: source.columns.get(role, role) for role in ROLES[source.format]}
    image = _image_column(source, table)
    columns = {
        role: column
        for role, column in roles.items()
        if role not in IMAGE_ROLES
        and (role not in OPTIONAL_ROLES or role in source.columns or column in there)
    }
    needed = [*([] if image is None else [("image", image)]), *columns.items()]
    missing = [(role, column) for role, column in needed if column not in there]
    if missing:
        remedy = ", ".join(f"{role}: <column>" for role, _ in missing)
        wanted = "; ".join(
            f"no column {column!r} for the {role}{_meant(column, there)}" for role, column in missing
        )
        raise DataError(
            f"{key}.columns: {label}, read as {source.format}: {wanted}. "
            f"The columns there are: {', '.join(there)}. Remedy: {key}.columns: {{{remedy}}}"
        )
    return image, columns


def _image_column(source: Source, table: Dataset) -> str | None:
    """Which column holds the images:

    the job names    the table has                        column
    a column         anything                             the named one
    none             image or images                      that one
    none             images under another name            image, which is then missed
    none             no images, and the format needs one  image, which is then missed
    none             no images                            None: rows of text
    """
    named = next((source.columns[role] for role in IMAGE_ROLES if role in source.columns), None)
    there = named or next((role for role in IMAGE_ROLES if role in table.column_names), None)
    if there is not None:
        return there
    elsewhere = any(_is_image(feature) for feature in table.features.values())
    return "image" if elsewhere or source.format in NEED_IMAGES else None


def _is_image(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, List | LargeList) else feature
    return isinstance(inner, Image)


def _image_folder(source: Source, path: Path, key: str) -> str:
    if source.image_folder is None:
        return str((path.parent if path.is_file() else path).absolute())
    folder = Path(source.image_folder).absolute()
    if not folder.is_dir():
        raise DataError(f"{key}.image_folder: no such folder: {folder}")
    return str(folder)


def _first(split: str) -> str:
    """The name that `train[:10%]+validation` begins with."""
    return re.split(r"[\[+(\s]", split, maxsplit=1)[0]


def _meant(word: str, known: list[str]) -> str:
    if word in known:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- images ---


def _image_list(chunk: pa.Array, folder: str, what: str) -> pa.ListArray:
    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
        values = chunk.flatten()
    else:
        lengths = [1] * len(chunk)
        values = chunk
    offsets = pa.array([0, *pc.cumulative_sum(pa.array(lengths, pa.int32())).to_pylist()], pa.int32())
    return pa.ListArray.from_arrays(offsets, _stored(values, folder, what))


def _stored(values: pa.Array, folder: str, what: str) -> pa.StructArray:
    """`{bytes, path}` of every value; null where there is none."""
    kind = values.type
    nothing = values.is_null()
    if pa.types.is_null(kind):
        data, paths = pa.nulls(len(values), pa.binary()), pa.nulls(len(values), pa.string())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        data, paths = pa.nulls(len(values), pa.binary()), values.cast(pa.string())
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data, paths = values.cast(pa.binary()), pa.nulls(len(values), pa.string())
    elif pa.types.is_struct(kind) and {field.name for field in kind} <= {"bytes", "path"}:
        fields = {field.name: values.field(field.name) for field in kind}
        data = fields["bytes"].cast(pa.binary()) if "bytes" in fields else pa.nulls(len(values), pa.binary())
        paths = fields["path"].cast(pa.string()) if "path" in fields else pa.nulls(len(values), pa.string())
        nothing = pc.or_(nothing, pc.and_(data.is_null(), paths.is_null()))
    else:
        raise DataError(f"{what}: it holds {kind}, not images, their bytes or their paths")
    if data.null_count:
        files = zip(data.is_null().to_pylist(), paths.to_pylist(), strict=True)
        paths = pa.array([_located(path, folder) if bare else path for bare, path in files], pa.string())
    return pa.StructArray.from_arrays([data, paths], fields=list(_STORED), mask=nothing)


def _located(path: str | None, folder: str) -> str | None:
    """A path from the folder of the data; a URL is left as it is, for the inspection to name."""
    if path is None or "://" in path or path.startswith("data:"):
        return path
    return str(Path(folder, path))


def _reordered(chunk: pa.ListArray, orders: Sequence[Sequence[int]]) -> pa.ListArray:
    first = chunk.offsets.to_pylist()
    taken = [first[row] + image for row, order in enumerate(orders) for image in order]
    ends = [0, *itertools.accumulate(len(order) for order in orders)]
    return pa.ListArray.from_arrays(
        pa.array(ends, pa.int32()), chunk.values.take(pa.array(taken, pa.int64()))
    )


def images_dataset(column: pa.ChunkedArray, fingerprint: str) -> Dataset:
    """A dataset of one column, `images`, over the same memory as what `image_lists` returned."""
    info = DatasetInfo(features=Features({"images": IMAGES}))
    return Dataset(pa.table({"images": column}), info=info, fingerprint=fingerprint)
