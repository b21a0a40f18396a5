"""The embedded demo: what the charts show, what the dataset holds, and what the tiny model knows."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runner import demo
from runner.demo import charts, lessons, preferences, pretrain
from runner.errors import DataError

REPOSITORY = Path(__file__).parents[1]
CHARTQA_COLUMNS = ["image", "query", "label", "human_or_machine"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.resolve_dataset("demo:charts", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def splits(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from datasets import load_dataset

    return dict(load_dataset(str(built), cache_dir=str(tmp_path_factory.mktemp("datasets"))))


def read_back(image: Image.Image) -> tuple[tuple[str, int], ...]:
    """The columns of a chart from its pixels alone: (colour, value) from left to right.

    The value is the height of the topmost pixel of a colour (bars stand on the base line), or of the middle
    when the pixels are a point's square.
    """
    names = {rgb: name for name, rgb in charts.COLOURS.items()}
    pixels = image.convert("RGB").load()
    assert pixels is not None
    found: dict[str, list[tuple[int, int]]] = {}
    for x in range(charts.LEFT + 1, charts.SIZE):
        for y in range(16, charts.BASE):
            name = names.get(pixels[x, y])  # type: ignore[arg-type]
            if name is not None:
                found.setdefault(name, []).append((x, y))
    columns = []
    for name, points in found.items():
        top, bottom = min(y for _, y in points), max(y for _, y in points)
        square = bottom - top == max(x for x, _ in points) - min(x for x, _ in points) == 8
        height = (top + bottom) // 2 if square and bottom < charts.BASE - 1 else top
        columns.append((min(x for x, _ in points), name, charts.BASE - height))
    return tuple((name, value) for _, name, value in sorted(columns))


def expected(query: str, columns: tuple[tuple[str, int], ...]) -> str:
    """The answer to a question, worked out from what was read back."""
    values = dict(columns)
    words = query.rstrip("?").split()
    if query.startswith("What is the value of the"):
        return str(values[words[6]])
    if query.startswith("Which"):
        pick = max if words[-1] == "highest" else min
        return pick(values, key=lambda name: values[name])
    if query == "What is the highest value?":
        return str(max(values.values()))
    if query.startswith("How many"):
        return str(len(values))
    assert words[0] == "Is" and words[2:4] == ["higher", "than"], query
    return "Yes" if values[words[1]] > values[words[4]] else "No"


def test_rows_are_the_same_on_every_machine() -> None:
    """Pinned: questions, answers and pixels of the first rows. A change must raise `charts.VERSION`."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        for row in charts.rows(split, 20):
            digest.update(repr((row["query"], row["label"], row["human_or_machine"])).encode())
        for chart in islice(charts.charts(split), 20):
            digest.update(charts.draw(chart).tobytes())
    assert charts.VERSION == "1"
    assert digest.hexdigest() == "3465f791d74fe985218e394b6fe4be172c534974b8b210567455c283a39cb388"


def test_another_seed_draws_other_charts() -> None:
    assert list(charts.rows("test", 5, seed=1)) != list(charts.rows("test", 5, seed=0))
    assert list(charts.rows("test", 5, seed=1)) == list(charts.rows("test", 5, seed=1))


def test_dataset_has_the_columns_of_chartqa(splits: dict[str, Any]) -> None:
    from datasets import ClassLabel, List, Value
    from datasets import Image as ImageFeature

    assert {name: len(rows) for name, rows in splits.items()} == charts.ROWS
    for rows in splits.values():
        assert rows.column_names == CHARTQA_COLUMNS
        assert isinstance(rows.features["image"], ImageFeature)
        assert rows.features["query"] == Value("string")
        assert rows.features["label"] == List(Value("string"))
        assert rows.features["human_or_machine"] == ClassLabel(names=["human", "machine"])
        share = sum(rows["human_or_machine"]) / len(rows)
        assert 0.4 < share < 0.6
    assert splits["val"].num_rows >= 240 and splits["test"].num_rows >= 240


def test_slices_load_by_split_name(built: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    for split, count in (("train[:50%]", charts.ROWS["train"] // 2), ("val[:10]", 10)):
        assert len(load_dataset(str(built), split=split, cache_dir=str(tmp_path))) == count


def test_answers_match_the_pixels_and_no_chart_is_in_two_splits(splits: dict[str, Any]) -> None:
    contents: dict[str, set[tuple[tuple[str, int], ...]]] = {}
    for name, rows in splits.items():
        step = 10 if name == "train" else 1
        for row in (rows[index] for index in range(0, len(rows), step)):
            columns = read_back(row["image"])
            assert row["label"] == [expected(row["query"], columns)], (name, row["query"], columns)
            contents.setdefault(name, set()).add(columns)
    assert len(contents["test"]) == charts.ROWS["test"], "every row of test shows another chart"
    assert len(contents["val"]) == charts.ROWS["val"]
    drawn = {chart.content for chart in islice(charts.charts("train"), charts.ROWS["train"])}
    assert contents["train"] <= drawn
    for held_out in ("val", "test"):
        assert not contents[held_out] & drawn
    assert not contents["val"] & contents["test"]


def test_pretraining_sees_charts_of_train_only() -> None:
    for chart in islice(pretrain.lesson_charts(seed=0), 500):
        assert charts.split_of(chart) == "train"


def test_lessons_do_not_ask_the_questions_of_the_dataset() -> None:
    rng = random.Random(0)
    asked = {charts.ask(chart, rng).query for chart in islice(charts.charts("train"), 500)}
    for chart in islice(charts.charts("train"), 500):
        assert not asked & {question for question, _ in lessons.lesson(chart, rng).turns}


def test_pairs_are_the_same_on_every_machine() -> None:
    """Pinned as the charts are. A change must raise `preferences.VERSION`."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        for row in preferences.rows(split, 20):
            with Image.open(io.BytesIO(row["image"]["bytes"] or b"")) as image:
                digest.update(image.tobytes())
            digest.update(repr((row["question"], row["chosen"], row["rejected"])).encode())
    assert preferences.VERSION == "1-1"
    assert digest.hexdigest() == "73dc4068c8777138c5c25759115d0b65ccbe70ab8f55e0e83c49572497156f5d"


def test_pairs_match_the_pixels_and_each_chart_is_there_with_its_answers_exchanged(tmp_path: Path) -> None:
    from datasets import load_dataset

    built = demo.resolve_dataset("demo:preferences", tmp_path)
    splits = dict(load_dataset(str(built), cache_dir=str(tmp_path / "datasets")))
    assert {name: len(rows) for name, rows in splits.items()} == preferences.ROWS
    assert preferences.ROWS["test"] >= 200
    for name, rows in splits.items():
        assert rows.column_names == ["image", "question", "chosen", "rejected"]
        step = 20 if name == "train" else 2
        for bars, line in ((rows[index], rows[index + 1]) for index in range(0, len(rows), step)):
            columns = read_back(bars["image"])
            assert read_back(line["image"]) == columns
            colours, values = zip(*columns, strict=True)
            shown = charts.Chart("bar", "", colours, values)
            assert charts.split_of(shown) == name
            rising = sorted(columns, key=lambda column: column[1])
            orders = [", ".join(f"{one} {value}" for one, value in way) for way in (rising, rising[::-1])]
            assert [bars["chosen"], bars["rejected"]] == orders
            assert [line["rejected"], line["chosen"]] == orders


@pytest.mark.parametrize("name", ["demo:nothing", "smolvlm-tiny", "demo:", "demo:../x"])
def test_unknown_names_are_answered_with_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="demo:smolvlm-tiny"):
        demo.resolve_model(name)
    with pytest.raises(DataError, match="demo:charts"):
        demo.resolve_dataset(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_leave_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    together = threading.Barrier(2)

    def build(folder: Path) -> None:
        together.wait(timeout=30)
        (folder / "complete").write_text("yes")

    monkeypatch.setitem(demo._DATASETS, "charts", lambda: ("9", build))
    found: list[Path] = []

    def resolve() -> None:
        found.append(demo.resolve_dataset("demo:charts", tmp_path))

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "demo" / "charts-v9"] * 2
    assert [one.name for one in (tmp_path / "demo").iterdir()] == ["charts-v9"]
    assert (found[0] / "complete").read_text() == "yes"


def test_an_interrupted_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setitem(demo._DATASETS, "charts", lambda: ("9", build))
    with pytest.raises(KeyboardInterrupt):
        demo.resolve_dataset("demo:charts", tmp_path)
    assert list((tmp_path / "demo").iterdir()) == []


def test_names_are_known_without_heavy_imports() -> None:
    code = "import sys, runner.demo; print({'torch', 'PIL', 'datasets', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == b"set()"


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(demo.resolve_model("demo:smolvlm-tiny"))


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    folder = demo.resolve_model("demo:smolvlm-tiny")
    yield AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def test_model_is_a_small_idefics3_with_blocks_for_4_bit(model: Any) -> None:
    from torch import nn
    from transformers import Idefics3ForConditionalGeneration

    assert type(model) is Idefics3ForConditionalGeneration
    assert 800_000 < model.num_parameters() < 1_700_000
    folder = demo.resolve_model("demo:smolvlm-tiny")
    assert sum(one.stat().st_size for one in folder.iterdir()) < 4 * 2**20
    for name, layer in model.model.text_model.named_modules():
        if isinstance(layer, nn.Linear):
            assert layer.in_features % 64 == 0 and layer.out_features % 64 == 0, name
            assert layer.weight.numel() >= 4096, name


def test_processor_speaks_as_smolvlm(processor: Any) -> None:
    from transformers import Idefics3Processor

    assert type(processor) is Idefics3Processor
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>System: Be brief.<end_of_utterance>\nUser:<image>What?<end_of_utterance>\nAssistant:"
    )
    tokenizer = processor.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<end_of_utterance>",
        "<|im_end|>",
    )
    for special in ("<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_6_col_6>"):
        assert len(tokenizer.encode(special, add_special_tokens=False)) == 1


@pytest.mark.parametrize("text", ["".join(map(chr, range(32, 127))), "naïve 12.5 % → 3\n\ttab", "日本語"])
def test_tokenizer_takes_any_text(processor: Any, text: str) -> None:
    tokens = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.unk_token_id not in tokens
    assert processor.tokenizer.decode(tokens) == text


@pytest.mark.parametrize(("size", "tiles"), [((128, 128), 1), ((64, 40), 1), ((300, 500), 1)])
def test_any_image_is_one_tile(processor: Any, size: tuple[int, int], tiles: int) -> None:
    inputs = processor(images=[[Image.new("RGB", size, "red")]], text=["<image>"], return_tensors="pt")
    assert tuple(inputs["pixel_values"].shape) == (1, tiles, 3, 128, 128)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == tiles * pretrain.IMAGE_TOKENS


def test_a_longer_edge_gives_more_tiles_as_with_smolvlm() -> None:
    from transformers import AutoProcessor

    folder = demo.resolve_model("demo:smolvlm-tiny")
    processor = AutoProcessor.from_pretrained(folder, size={"longest_edge": 256})
    inputs = processor(images=[[Image.new("RGB", (128, 128), "red")]], text=["<image>"], return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 5


def test_lessons_are_what_the_processor_makes_of_them(processor: Any) -> None:
    import torch

    rng = random.Random(0)
    taught = [lessons.lesson(chart, rng) for chart in islice(charts.charts("train"), 8)]
    batch = pretrain.make_batch(taught, processor.tokenizer)
    pictures = []
    for index, lesson in enumerate(taught):
        messages: list[dict[str, Any]] = []
        if lesson.system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": lesson.system}]})
        for turn, (question, answer) in enumerate(lesson.turns):
            image = [{"type": "image"}] if lesson.chart is not None and turn == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        images = None if lesson.chart is None else [[charts.draw(lesson.chart)]]
        inputs = processor(images=images, text=[processor.apply_chat_template(messages)], return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, :width], inputs["input_ids"][0])
        if images is not None:
            pictures.append(inputs["pixel_values"][0])
        told = processor.tokenizer.decode(batch["labels"][index][batch["labels"][index] != -100])
        assert told == "".join(f" {answer}<end_of_utterance>\n" for _, answer in lesson.turns)
    torch.testing.assert_close(batch["pixel_values"], torch.stack(pictures))


def test_model_reads_charts_and_does_not_answer_questions(model: Any, processor: Any) -> None:
    """What the base model knows (a transcription), and what the demo job has to teach it (an answer)."""
    shown = list(islice(charts.charts("val"), 16))
    said = say(model, processor, [(chart, "Transcribe the chart.") for chart in shown])
    truth = [", ".join(f"{colour} {value}" for colour, value in chart.content) for chart in shown]
    assert sum(one == other for one, other in zip(said, truth, strict=True)) >= 13
    rng = random.Random(0)
    questions = [charts.ask(chart, rng) for chart in shown]
    said = say(model, processor, [(chart, one.query) for chart, one in zip(shown, questions, strict=True)])
    assert sum(one == other.answer for one, other in zip(said, questions, strict=True)) <= 3


def say(model: Any, processor: Any, asked: list[tuple[charts.Chart, str]]) -> list[str]:
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for _, question in asked
    ]
    images = [[charts.draw(chart)] for chart, _ in asked]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_pretraining_reproduces_itself_and_the_committed_processor(tmp_path: Path) -> None:
    for name in ("first", "second"):
        command = [sys.executable, "-m", "runner.demo.pretrain", "--output", str(tmp_path / name)]
        few = ["--see-steps", "2", "--speak-steps", "2", "--batch", "4"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([*command, *few], cwd=REPOSITORY, env=environment, check=True)
    first = contents_of(tmp_path / "first")
    assert first == contents_of(tmp_path / "second")
    committed = contents_of(demo.resolve_model("demo:smolvlm-tiny"))
    assert committed.keys() == first.keys()
    for name in first.keys() - {"model.safetensors"}:
        assert first[name] == committed[name], name
    assert len(first["model.safetensors"]) == len(committed["model.safetensors"])
