"""Small pictures, datasets on disk and processors that several tests build their cases from."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin
from trl.chat_template_utils import smolvlm_chat_template

from runner.demo import resolve_model
from runner.manifest import Datasets, Source
from runner.train.data.rows import Rows, load

LIMIT = 512


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Pillow.Image:
    """RGB noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


def encoded(image: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int = 0, width: int = 48, height: int = 32) -> bytes:
    return encoded(picture(width, height, seed))


def grey16() -> bytes:
    """A 16-bit PNG: 0, 257, 65535 and what lies between."""
    values = np.linspace(0, 65535, 40 * 30).round().astype(np.uint16).reshape(30, 40)
    return encoded(Pillow.fromarray(values))


def palette() -> bytes:
    return encoded(picture(seed=1).quantize(16))


def cmyk() -> bytes:
    return encoded(picture(seed=2).convert("CMYK"), "JPEG")


def sideways() -> bytes:
    """A photo of 48 x 32 pixels that its EXIF orientation turns to 32 x 48."""
    exif = Pillow.Exif()
    exif[0x0112] = 6
    return encoded(picture(seed=3), "JPEG", exif=exif)


def broken() -> bytes:
    return png(seed=4)[:400]


CHARTQA = Features(
    {
        "image": Image(),
        "query": Value("string"),
        "label": List(Value("string")),
        "human_or_machine": ClassLabel(names=["human", "machine"]),
    }
)
COLUMNS = {"question": "query", "answer": "label", "group": "human_or_machine"}


def chartqa(folder: Path, images: Sequence[bytes | None], **columns: Sequence[Any]) -> Path:
    """A folder with one parquet file, split train, in ChartQA's columns."""
    count = len(images)
    rows: dict[str, Sequence[Any]] = {
        "image": [None if data is None else {"bytes": data, "path": None} for data in images],
        "query": [f"What is value {number}?" for number in range(count)],
        "label": [[str(number)] for number in range(count)],
        "human_or_machine": [number % 2 for number in range(count)],
        **columns,
    }
    return _parquet(folder, rows, CHARTQA)


PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


def rlaif_v(folder: Path, images: Sequence[bytes | None], **columns: Sequence[Any]) -> Path:
    """A folder with one parquet file, split train, in the columns of openbmb/RLAIF-V-Dataset."""
    count = len(images)
    rows: dict[str, Sequence[Any]] = {
        "ds_name": ["RLAIF-V"] * count,
        "image": [None if data is None else {"bytes": data, "path": None} for data in images],
        "question": [f"What is value {number}?" for number in range(count)],
        "chosen": [f"It is {number}." for number in range(count)],
        "rejected": ["I see " + "many, " * number + "and a red bar." for number in range(count)],
        "idx": [str(number) for number in range(count)],
        **columns,
    }
    features = Features({name: Image() if name == "image" else Value("string") for name in rows})
    return _parquet(folder, rows, features)


def rlaif_v_formatted(folder: Path, images: Sequence[list[bytes]], **columns: Sequence[Any]) -> Path:
    """The same pairs in the columns of HuggingFaceH4/rlaif-v_formatted."""

    def said(role: str, text: str, shown: int = 0) -> list[dict[str, Any]]:
        parts = [{"type": "image", "text": None}] * shown
        return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]

    count = len(images)
    rows: dict[str, Sequence[Any]] = {
        "images": [[{"bytes": data, "path": None} for data in row] for row in images],
        "prompt": [said("user", f"What is value {n}?", len(images[n])) for n in range(count)],
        "chosen": [said("assistant", f"It is {n}.") for n in range(count)],
        "rejected": [said("assistant", "I see " + "many, " * n + "and a red bar.") for n in range(count)],
        **columns,
    }
    features = Features({name: List(Image()) if name == "images" else PARTS for name in rows})
    return _parquet(folder, rows, features)


def _parquet(folder: Path, rows: dict[str, Sequence[Any]], features: Features) -> Path:
    (folder / "data").mkdir(parents=True)
    table = Dataset.from_dict(dict(rows), features=features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def jsonl(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def source(path: str = "charts", **fields: Any) -> Source:
    given: dict[str, Any] = {"path": path, "format": "vqa", **fields}
    if given["format"] == "vqa":
        given.setdefault("columns", COLUMNS)
    return Source(**given)


def rows(
    processor: ProcessorMixin,
    *parts: tuple[Source, Path],
    limit: int = LIMIT,
    seed: int = 42,
    name: Any = "train",
    max_samples: int | None = None,
    **policy: Any,
) -> Rows:
    """`data.load`, with what most tests do not vary."""
    sources = [part for part, _ in parts]
    return load(
        sources,
        [str(location) for _, location in parts],
        Datasets(train=sources, **policy),
        seed,
        processor,
        limit,
        name,
        max_samples,
    )


def smolvlm() -> ProcessorMixin:
    """The demo's processor with SmolVLM's own chat template, which TRL knows a marked edition of."""
    folder = resolve_model("demo:smolvlm-tiny")
    processor = AutoProcessor.from_pretrained(folder)
    # Given to AutoProcessor, `backend` would reach the tokenizer, too, which then claims to be no fast one.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor.chat_template = smolvlm_chat_template
    return processor


def llava_next(base: ProcessorMixin) -> ProcessorMixin:
    """A processor whose tokens grow with the image: one tile of 16 tokens per 56 pixels, up to 3 x 3."""
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    side = 56
    grids = [[side * rows, side * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=grids,
        ),
        tokenizer=copy.deepcopy(base.tokenizer),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=base.chat_template,
    )


def idefics2(base: ProcessorMixin) -> ProcessorMixin:
    """A processor without a formula for its tokens."""
    from transformers import Idefics2ImageProcessorPil, Idefics2Processor

    return Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}),
        tokenizer=copy.deepcopy(base.tokenizer),
        image_seq_len=16,
        chat_template=base.chat_template,
    )
