"""Small copies of the public datasets that the job files name: their real columns and types, our charts.

The schemas are those of the dataset viewer (September 2026). A job that reads a column that is not there, or
reads it as something that it is not, fails on such a copy as it would on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from tests.attempts import charts

TEXT = Value("string")
TURNS = List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})})
ROWS = 50
"""A slice of 2 % is one row."""

SCHEMAS: dict[str, tuple[Features, tuple[str, ...]]] = {
    "HuggingFaceM4/ChartQA": (
        Features(
            {
                "image": Image(),
                "query": TEXT,
                "label": List(TEXT),
                "human_or_machine": ClassLabel(names=["human", "machine"]),
            }
        ),
        ("train", "val", "test"),
    ),
    "HuggingFaceH4/rlaif-v_formatted": (
        Features({"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, "images": List(Image())}),
        ("train", "test"),
    ),
    "openbmb/RLAIF-V-Dataset": (
        Features(
            {
                "ds_name": TEXT,
                "image": Image(),
                "question": TEXT,
                "chosen": TEXT,
                "rejected": TEXT,
                "origin_dataset": TEXT,
                "origin_split": TEXT,
                "idx": TEXT,
                "image_path": TEXT,
            }
        ),
        ("train",),
    ),
    "lambdalabs/naruto-blip-captions": (Features({"image": Image(), "text": TEXT}), ("train",)),
}
"""Hub id -> columns and splits."""


def copy(hub_id: str, folder: Path) -> Path:
    """A folder that `datasets.load_dataset` reads as it reads the hub's."""
    features, splits = SCHEMAS[hub_id]
    target = folder / hub_id.replace("/", "--")
    for split in splits:
        file = target / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list([_row(features, chart) for chart in _charts()], features=features).to_parquet(file)
    return target


def _charts() -> Dataset:
    source = str(next(charts().glob("data/train*")))
    rows = datasets.load_dataset("parquet", data_files=source, split=f"train[:{ROWS}]")
    return rows.cast_column("image", Image(decode=False))


def _row(features: Features, chart: dict[str, Any]) -> dict[str, Any]:
    """What each column holds, by its name and type."""
    answer, wrong = chart["label"][0], f"not {chart['label'][0]}"
    values = {
        "image": chart["image"],
        "images": [chart["image"]],
        "query": chart["query"],
        "question": chart["query"],
        "label": [answer],
        "text": answer,
        "human_or_machine": 0,
        "prompt": [_turn("user", {"type": "image", "text": None}, {"type": "text", "text": chart["query"]})],
        "chosen": answer,
        "rejected": wrong,
    }
    if features["chosen"] == TURNS if "chosen" in features else False:
        values["chosen"], values["rejected"] = (
            [_turn("assistant", {"type": "text", "text": text})] for text in (answer, wrong)
        )
    return {name: values.get(name, "0") for name in features}


def _turn(role: str, *content: dict[str, str | None]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}
