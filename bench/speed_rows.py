"""The rows of the speed bench: charts that differ, questions, and answers of the lengths that people write.

A picture is 850 x 600, as ChartQA's are: bars, a line and a grid over a shaded ground, drawn from the seed.
An answer of sft is a word or a number or two; the two of a pair have 20 to 60 tokens each, and differ in
length. Nothing is learned from them: what counts is how long they take.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_flops import Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

WIDTH, HEIGHT = 850, 600
WORDS = ["bar", "line", "red", "blue", "higher", "lower", "value", "year", "about", "half", "of", "is"]
SHORTEST, LONGEST = 20, 60
"""Tokens of an answer of a pair."""


def picture(rng: random.Random) -> Image:
    """A chart, RGB; no two of one generator are alike, and no tile of it is all of one colour."""
    from PIL import Image, ImageDraw, ImageOps

    shade = Image.linear_gradient("L").resize((WIDTH, HEIGHT)).rotate(rng.choice((0, 180)))
    dark, light = (tuple(rng.randint(low, low + 40) for _ in range(3)) for low in (150, 210))
    image = ImageOps.colorize(shade, dark, light)
    pen = ImageDraw.Draw(image)
    for level in range(40, HEIGHT, 70):
        pen.line((40, level, WIDTH - 20, level), fill=(90, 90, 90))
        pen.text((5, level - 5), str(rng.randint(0, 999)), fill=(0, 0, 0))
    bars = rng.randint(5, 12)
    step = (WIDTH - 80) // bars
    tops = [rng.randint(60, HEIGHT - 120) for _ in range(bars)]
    for number, top in enumerate(tops):
        left = 50 + number * step
        colour = tuple(rng.randint(0, 255) for _ in range(3))
        pen.rectangle((left, top, left + step * 2 // 3, HEIGHT - 60), fill=colour)
        pen.text((left, HEIGHT - 50), f"{rng.choice(WORDS)} {rng.randint(0, 99)}", fill=(0, 0, 0))
    pen.line(
        [(50 + number * step, HEIGHT - top) for number, top in enumerate(tops)], fill=(20, 20, 20), width=3
    )
    return image


def build_rows(file: Path, method: str, images: int, questions: int, processor: ProcessorMixin) -> None:
    """Write a parquet file: `images` pictures with `questions` rows each, shuffled.

    Its columns are image, query, label for sft; image, question, chosen, rejected for dpo.
    """
    from datasets import Dataset, Image

    rng = random.Random(f"speed/{method}/{images}/{questions}")
    rows: list[dict[str, Any]] = []
    for number in range(images):
        shown = picture(rng)
        for question in range(questions):
            asked = (
                f"What is the {rng.choice(WORDS)} {rng.choice(WORDS)} of bar {question} in {1900 + number}?"
            )
            rows.append({"image": shown, **(_pair if method == "dpo" else _answer)(asked, rng, processor)})
    rng.shuffle(rows)
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(file)


def _answer(asked: str, rng: random.Random, processor: ProcessorMixin) -> dict[str, Any]:
    value = str(rng.randint(0, 9999)) if rng.random() < 0.5 else " ".join(rng.sample(WORDS, 3))
    return {"query": asked, "label": [value]}


def _pair(asked: str, rng: random.Random, processor: ProcessorMixin) -> dict[str, Any]:
    first, second = rng.sample(range(SHORTEST, LONGEST), 2)
    return {
        "question": asked,
        "chosen": _text(first, rng, processor),
        "rejected": _text(second, rng, processor),
    }


def _text(tokens: int, rng: random.Random, processor: ProcessorMixin) -> str:
    """Words of at least so many tokens, and at most a word more."""
    words = [rng.choice(WORDS)]
    while len(processor.tokenizer(" ".join(words))["input_ids"]) < tokens:
        words.append(rng.choice(WORDS))
    return " ".join(words)


def sample(file: Path, method: str, questions: int, processor: ProcessorMixin) -> Sample:
    """Tokens and patches of a row of the file, in the mean: all pictures are of one size."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(file), split="train")
    names = ("question", ("chosen", "rejected")) if method == "dpo" else ("query", ("label",))
    parts = [{"type": "image", "image": rows[0]["image"]}, {"type": "text", "text": ""}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    def mean(column: str) -> float:
        texts = [value if isinstance(value, str) else value[0] for value in rows[column]]
        return sum(len(processor.tokenizer(text)["input_ids"]) for text in texts) / len(texts)

    pixels, begins = made["pixel_values"], float(made["input_ids"].shape[1])
    side = 14  # of a patch, in every model of the bench
    tiled = pixels.dim() == 5  # (1, tiles, 3, H, W), against Qwen2-VL's (patches, values)
    ends = [mean(name) for name in names[1]]
    question = mean(names[0])
    return Sample(
        images=pixels.shape[1] if tiled else 1,
        patches=(pixels.shape[3] // side) * (pixels.shape[4] // side) if tiled else pixels.shape[0],
        image_tokens=int((made["input_ids"] == processor.image_token_id).sum()),
        prompt=begins + (question if method == "dpo" else 0),
        answers=tuple(end + (0 if method == "dpo" else question) for end in ends),
        scored=sum(ends),
        shared_by=questions,
    )
