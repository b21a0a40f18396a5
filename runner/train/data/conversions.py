"""The texts of a source as tables: every row converted once, and kept in the cache of `datasets`.

What a row means is `runner.train.data.formats`'. Images are not touched here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from runner.manifest import PAIRS, Source
from runner.train.data import formats
from runner.train.data.collator import Form
from runner.train.data.sources import Opened

_TEXT = Value("string")
_MESSAGES = List({"role": _TEXT, "content": List({"type": _TEXT, "text": _TEXT})})
_SPOKEN = {"question": _TEXT, "answers": List(_TEXT), "group": _TEXT}
_CONVERTED = Features(
    {
        "messages": _MESSAGES,
        "rejected": _MESSAGES,
        "shown": List(Value("int32")),
        **_SPOKEN,
        "turns": Value("int32"),
        "history": Value("bool"),
        "digest": _TEXT,
        "problem": _TEXT,
    }
)


def converted(
    opened: Opened, source: Source, counts: list[int], controls: str, num_proc: int | None
) -> Dataset:
    """Every row of a source as `formats.Converted`.

    Args:
        counts: images of every row.
        controls: see `formats.Reading`.
    """
    reading = formats.Reading(
        format=source.format,
        columns=opened.columns,
        system_prompt=source.system_prompt,
        prompt=source.prompt,
        labels=opened.classes(),
        controls=controls,
    )
    table = opened.table.select_columns(sorted(set(opened.columns.values())))
    return table.map(
        _convert_row,
        with_indices=True,
        fn_kwargs={"counts": counts, "reading": reading, "version": formats.VERSION},
        remove_columns=table.column_names,
        features=_CONVERTED,
        num_proc=num_proc,
        desc=f"{opened.label}: text",
    )


def _convert_row(
    row: Mapping[str, Any], number: int, *, counts: list[int], reading: formats.Reading, version: int
) -> formats.Converted:
    return formats.convert(row, counts[number], reading)


def form_of(sources: Sequence[Source], texts: Sequence[Dataset], drawn: Sequence[list[int]]) -> Form:
    """What the collator makes of the rows:

    sources                                             form
    pairs of answers                                    preference
    a drawn row has several assistant turns to learn    messages
    else                                                prompt_completion

    Pairs and rows of one answer never meet: `runner.job.matrix` refuses one of them by the method.
    """
    pairs = {source.format in PAIRS for source in sources}
    assert len(pairs) == 1
    if True in pairs:
        return "preference"
    for text, rows in zip(texts, drawn, strict=True):
        turns = text.data.column("turns").to_pylist()
        if any(turns[row] > 1 for row in rows):
            return "messages"
    return "prompt_completion"


def shaped(text: Dataset, form: Form) -> Dataset:
    """The columns that training and evaluation read."""
    spoken = [*_SPOKEN]
    if form == "messages":
        return text.select_columns(["messages", *spoken])
    if form == "preference":
        features = Features({"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES, **_SPOKEN})
        split = _split_pair
    else:
        features = Features({"prompt": _MESSAGES, "completion": _MESSAGES, **_SPOKEN})
        split = _split
    there = ["messages", "rejected", *spoken]
    return text.select_columns(there).map(split, remove_columns=there[:2], features=features)


def _split(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def _split_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": row["messages"][:-1],
        "chosen": row["messages"][-1:],
        "rejected": row["rejected"],
    }
