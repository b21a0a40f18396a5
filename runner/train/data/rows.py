"""The job's datasets -> `Rows`: every row that will be trained or evaluated on, checked before step 1.

    open      each source by `datasets`                                  .sources
    draw      max_samples of each source, then of all, by seed, in the order of the dataset
    convert   every row to messages                                      .conversions, .formats
    inspect   every drawn image: full decode under the image policy      .images
    count     the tokens of every row                                    .tokens
    judge     by the job's on_bad_row and on_overflow                    .checks
    join      the columns of `Rows.dataset`, over the image bytes as `datasets` stored them

Conversions and inspections are kept in the cache of `datasets`, so a resumed run does not repeat them, but
for images that lie in files of their own: those may have changed. Nothing here decodes for training; the
collator does.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetInfo, Features, List, Value, concatenate_datasets
from transformers import ProcessorMixin

from runner.manifest import Datasets, Source
from runner.train.data import formats, images
from runner.train.data.checks import Candidate, judge, notes
from runner.train.data.collator import Collator, Form
from runner.train.data.conversions import converted, form_of, shaped
from runner.train.data.sources import (
    Opened,
    image_counts,
    image_lists,
    images_dataset,
    no_images,
    open_source,
    shown_images,
)

_TEXT = Value("string")
_INSPECTED = Features(
    {
        "problem": _TEXT,
        "notes": List(_TEXT),
        "heights": List(Value("int32")),
        "widths": List(Value("int32")),
        "digest": _TEXT,
    }
)
_EXTRAS = Features(
    {
        "row": _TEXT,
        "index": Value("int64"),
        "image_count": Value("int32"),
        "tokens": Value("int32"),
        "text_tokens": Value("int32"),
        "scale": Value("float64"),
        "pixels": Value("int64"),
        "pictures": _TEXT,
        "digest": _TEXT,
    }
)


@dataclass(frozen=True)
class Rows:
    """Rows that are ready to be collated."""

    dataset: Dataset
    """One row each, in the order of the job's sources. Columns:

        images        undecoded {bytes, path}, any number of them, in the order of the image parts
        prompt, completion | messages | prompt, chosen, rejected
                      lists of {role, content: [{type, text}]}; which of the three is `form`
        question      what the last user message asks
        answers       accepted in evaluation; the first one is trained on, or preferred
        group         part of the evaluation (ChartQA: human, augmented), or null
        row           the row's name for people: `path[split] row 123`, counted from 0 within the split
        index         its position here, 0..n-1
        image_count   how many images it shows; 0 for a row of text among them, which one process can train
                      on, and a strategy that shards the model over several cannot
        tokens        its length, image tokens included, when it is collated alone; of a pair, that of the
                      longer sequence
        text_tokens   of them those of its text, each image one placeholder
        scale         factor that its images are shrunk by; 1.0 but for on_overflow: resize
        pixels        of all images that it shows, before the processor
        pictures      SHA-256 of the images that it shows, as they are shown; equal where the images are, null
                      of a row of text
        digest        SHA-256 of all that it says and shows
    """
    form: Form
    skipped: tuple[tuple[str, str], ...]
    """Name and reason of every row that was left out."""
    notes: tuple[str, ...]
    """What was changed to make images RGB, or rows short enough, with the names of the rows; and sources that
    have no images."""
    max_tokens: int
    """Tokens of the longest row."""
    fingerprint: str
    """SHA-256 over the content of all rows in order, images included; it knows nothing of paths or caches."""


def load(
    sources: Sequence[Source],
    locations: Sequence[str],
    policy: Datasets,
    seed: int,
    processor: ProcessorMixin,
    limit: int,
    name: Literal["train", "eval"],
    max_samples: int | None = None,
) -> Rows:
    """Load, check and join sources.

    Args:
        locations: where each source lies on this machine: a folder or a file.
        limit: tokens that a row may have.
        name: `train` or `eval`, as under `datasets` in the job.
        max_samples: at most this many rows over all sources, drawn by seed after each source's own
            `max_samples`.

    Raises:
        DataError: something cannot be read; or rows are bad or too long, all of them in one message, where
            the job wants that to be an error.
    """
    opened = [
        open_source(source, location, f"datasets.{name}[{number}]")
        for number, (source, location) in enumerate(zip(sources, locations, strict=True))
    ]
    drawn = _drawn([len(one.table) for one in opened], sources, max_samples, f"{seed}/{name}")
    pictures = [_pictures(one) for one in opened]
    counts = [image_counts(one) for one in pictures]
    controls = _controls(processor)
    texts = [
        converted(one, source, count, controls, policy.num_proc)
        for one, source, count in zip(opened, sources, counts, strict=True)
    ]
    shown: list[list[list[int]]] = [text.data.column("shown").to_pylist() for text in texts]
    found = [
        _inspected(one, picture, rows, policy.num_proc)
        for one, picture, rows in zip(opened, pictures, drawn, strict=True)
    ]
    form = form_of(sources, texts, drawn)
    candidates = _candidates(opened, texts, shown, found, drawn, form)
    joined = concatenate_datasets(
        [
            concatenate_datasets(
                [images_dataset(shown_images(picture, orders), f"{one.key}-images"), shaped(text, form)],
                axis=1,
            )
            for one, picture, orders, text in zip(opened, pictures, shown, texts, strict=True)
        ]
    )
    # Never sent to another process or to a model, so its dtype means nothing.
    collator = Collator(processor, "prompt_completion", torch.float32)
    verdict = judge(candidates, joined, collator, policy, limit, f"datasets.{name}")
    return Rows(
        dataset=_dataset(joined, verdict.kept, [len(order) for orders in shown for order in orders]),
        form=form,
        skipped=tuple((row.name, row.problem or "") for row in verdict.left_out),
        notes=(*_text_only(opened), *notes(verdict.kept, f"datasets.{name}")),
        max_tokens=max(row.tokens for row in verdict.kept),
        fingerprint=_fingerprint(verdict.kept, form),
    )


def _drawn(
    lengths: Sequence[int], sources: Sequence[Source], max_samples: int | None, seed: str
) -> list[list[int]]:
    """The rows of each source that take part, ascending: its own max_samples first, then the overall one."""
    drawn = []
    for number, (length, source) in enumerate(zip(lengths, sources, strict=True)):
        rng = random.Random(f"{seed}/{number}")
        few = length if source.max_samples is None else min(length, source.max_samples)
        drawn.append(sorted(rng.sample(range(length), few)))
    pairs = [(number, row) for number, rows in enumerate(drawn) for row in rows]
    if max_samples is None or max_samples >= len(pairs):
        return drawn
    kept = random.Random(seed).sample(pairs, max_samples)
    return [sorted(row for number, row in kept if number == wanted) for wanted in range(len(lengths))]


def _pictures(opened: Opened) -> pa.ChunkedArray:
    """The images of every row, as the source has them."""
    if opened.image is None:
        return no_images(len(opened.table))
    column = opened.table.data.column(opened.image)
    what = f"{opened.key}.columns: column {opened.image!r} of {opened.label}"
    return image_lists(column, opened.folder, what)


def _text_only(opened: Sequence[Opened]) -> list[str]:
    """Said aloud, because a column of paths under another name looks like text, too."""
    return [
        f"{one.key}: {one.label} has no column of images: its rows are text"
        for one in opened
        if one.image is None
    ]


def _controls(processor: ProcessorMixin) -> str:
    """Matches any token that a text may not spell: the tokenizer's special ones, those around image tokens
    among them, and the image placeholder."""
    added = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    tokens = {*processor.tokenizer.all_special_tokens, *added, processor.image_token}
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _inspected(opened: Opened, pictures: pa.ChunkedArray, rows: list[int], num_proc: int | None) -> Dataset:
    """`images.Inspection` of the drawn rows. Reads the source's own table, which other processes can map."""
    if opened.image is None:
        found = [dict(images.inspect([])) for _ in rows]
        nothing = pa.Table.from_pylist(found, schema=_INSPECTED.arrow_schema)
        return Dataset(nothing, info=DatasetInfo(features=_INSPECTED), fingerprint=f"{opened.key}-text")
    in_files = any(pc.any(chunk.values.field("bytes").is_null()).as_py() for chunk in pictures.chunks)
    table = opened.table.select_columns([opened.image]).select(rows).with_format("arrow")
    return table.map(
        _inspect_batch,
        batched=True,
        batch_size=32,
        fn_kwargs={"column": opened.image, "folder": opened.folder, "version": images.POLICY},
        remove_columns=[opened.image],
        features=_INSPECTED,
        num_proc=num_proc,
        load_from_cache_file=not in_files,
        desc=f"{opened.label}: images",
    ).with_format(None)


def _inspect_batch(batch: pa.Table, *, column: str, folder: str, version: int) -> pa.Table:
    lists = image_lists(batch.column(column), folder, column)
    found = [images.inspect(stored) for stored in lists.to_pylist()]
    return pa.Table.from_pylist([dict(one) for one in found], schema=_INSPECTED.arrow_schema)


def _candidates(
    opened: Sequence[Opened],
    texts: Sequence[Dataset],
    shown: Sequence[list[list[int]]],
    found: Sequence[Dataset],
    drawn: Sequence[list[int]],
    form: Form,
) -> list[Candidate]:
    candidates = []
    start = 0
    for one, text, orders, inspected, rows in zip(opened, texts, shown, found, drawn, strict=True):
        said = text.data.select(["digest", "problem", "history"]).to_pydict()
        for row, seen in zip(rows, inspected, strict=True):
            problem = seen["problem"] or said["problem"][row]
            if problem is None and form == "messages" and said["history"][row]:
                problem = (
                    "its prompt holds answers that shall carry no loss, and other rows have several turns "
                    "that shall; train on the two in separate runs"
                )
            sizes = list(zip(seen["heights"], seen["widths"], strict=True))
            candidates.append(
                Candidate(
                    position=start + row,
                    name=one.row(row),
                    problem=problem,
                    notes=tuple(seen["notes"]),
                    sizes=() if problem else tuple(sizes[image] for image in orders[row]),
                    digest=f"{said['digest'][row]} {seen['digest']}",
                    pictures=f"{seen['digest']} {orders[row]}",
                )
            )
        start += len(text)
    return candidates


def _dataset(joined: Dataset, kept: Sequence[Candidate], counts: Sequence[int]) -> Dataset:
    """The kept rows with all columns. Selected by position, so that image bytes stay where they are."""
    extras: dict[str, list[Any]] = {
        "row": [None] * len(joined),
        "index": [-1] * len(joined),
        "image_count": list(counts),
        "tokens": [0] * len(joined),
        "text_tokens": [0] * len(joined),
        "scale": [1.0] * len(joined),
        "pixels": [0] * len(joined),
        "pictures": [None] * len(joined),
        "digest": [None] * len(joined),
    }
    for index, row in enumerate(kept):
        extras["row"][row.position] = row.name
        extras["index"][row.position] = index
        extras["tokens"][row.position] = row.tokens
        extras["text_tokens"][row.position] = row.text_tokens
        extras["scale"][row.position] = row.scale
        if counts[row.position]:
            extras["pictures"][row.position] = _hash(f"{row.pictures} {row.scale!r}")
        extras["digest"][row.position] = _hash(f"{row.digest} {row.pictures} {row.scale!r}")
        sizes = [images.scaled(*size, row.scale) for size in row.sizes]
        extras["pixels"][row.position] = sum(height * width for height, width in sizes)
    table = pa.Table.from_pydict(extras, schema=_EXTRAS.arrow_schema)
    beside = Dataset(table, info=DatasetInfo(features=_EXTRAS), fingerprint="extras")
    return concatenate_datasets([joined, beside], axis=1).select([row.position for row in kept])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(kept: Sequence[Candidate], form: Form) -> str:
    digest = hashlib.sha256(f"{formats.VERSION} {images.POLICY} {form}".encode())
    for row in kept:
        digest.update(f"\n{row.digest} {row.scale!r}".encode())
    return digest.hexdigest()
