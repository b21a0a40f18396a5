"""Sources, formats, policies and token counts, on datasets on disk."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from transformers import ProcessorMixin

from runner.errors import DataError
from runner.train.data import lengths
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.data.tokens import Counted, TokenCounter
from tests.samples import (
    COLUMNS,
    broken,
    chartqa,
    cmyk,
    encoded,
    grey16,
    idefics2,
    jsonl,
    llava_next,
    palette,
    picture,
    png,
    rows,
    sideways,
    smolvlm,
    source,
)


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return smolvlm()


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(m["role"], [part["text"] or f"<{part['type']}>" for part in m["content"]]) for m in messages]


# --- formats ---


def test_vqa_in_chartqas_columns(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = chartqa(tmp_path / "charts", [png(0), png(1)], label=[["14", "fourteen"], ["Yes"]])
    made = rows(processor, (source(system_prompt="Be short."), folder))
    assert made.form == "prompt_completion"
    row = made.dataset[0]
    assert texts(row["prompt"]) == [("system", ["Be short."]), ("user", ["<image>", "What is value 0?"])]
    assert texts(row["completion"]) == [("assistant", ["14"])]
    assert (row["question"], row["answers"], row["group"]) == (
        "What is value 0?",
        ["14", "fourteen"],
        "human",
    )
    assert (row["row"], row["index"], row["image_count"], row["scale"]) == ("charts[train] row 0", 0, 1, 1.0)
    assert row["images"][0]["bytes"] == png(0)
    assert made.dataset[1]["group"] == "augmented"


def test_image_bytes_are_not_copied(tmp_path: Path, processor: ProcessorMixin) -> None:
    """The images column lies in the file that `datasets` mapped, whatever was drawn from it."""
    folder = chartqa(tmp_path / "charts", [encoded(picture(256, 256, seed)) for seed in range(8)])
    before = pa.total_allocated_bytes()
    made = rows(processor, (source(max_samples=5), folder))
    column = made.dataset.data.column("images")
    assert len(made.dataset) == 5
    assert column.nbytes > 8 * 150_000
    assert pa.total_allocated_bytes() - before < 150_000


def test_caption_from_jsonl_with_paths_beside_it(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(1))
    file = jsonl(tmp_path / "captions.jsonl", [{"image": "pictures/a.png", "caption": "Noise."}])
    made = rows(processor, (source("captions.jsonl", format="caption", prompt="Describe."), file))
    row = made.dataset[0]
    assert texts(row["prompt"]) == [("user", ["<image>", "Describe."])]
    assert texts(row["completion"]) == [("assistant", ["Noise."])]
    assert row["images"][0] == {"bytes": None, "path": str(tmp_path / "pictures" / "a.png")}
    moved = rows(
        processor,
        (source("captions.jsonl", format="caption", image_folder=str(tmp_path)), file),
    )
    assert texts(moved.dataset[0]["prompt"]) == [("user", ["<image>"])]


def test_messages_from_a_list_of_images(tmp_path: Path, processor: ProcessorMixin) -> None:
    turn = [
        {"role": "user", "content": "What differs?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Everything."}]},
    ]
    file = tmp_path / "pairs.json"
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    file.write_text(json.dumps([{"images": ["a.png", "b.png"], "messages": turn[:1] + turn[1:]}]))
    # JSON's reader wants one type for content, so the mixed form above comes as parquet as well.
    assert texts_of(processor, "pairs.json", file) == [("user", ["<image>", "<image>", "What differs?"])]


def texts_of(processor: ProcessorMixin, name: str, file: Path, **fields: Any) -> list[tuple[str, list[str]]]:
    return texts(rows(processor, (source(name, format="messages", **fields), file)).dataset[0]["prompt"])


def test_placeholders_stand_where_the_row_says(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_bytes(png())
    content = [{"type": "text", "text": "Before"}, {"type": "image"}, {"type": "text", "text": "after"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    file = jsonl(
        tmp_path / "t.jsonl", [{"image": "a.png", "messages": [{"role": "user", "content": content}, answer]}]
    )
    assert texts_of(processor, "t.jsonl", file) == [("user", ["Before", "<image>", "after"])]


def test_several_turns_make_every_row_messages(tmp_path: Path, processor: ProcessorMixin) -> None:
    talk = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And red?"},
        {"role": "assistant", "content": "One."},
    ]
    (tmp_path / "a.png").write_bytes(png())
    file = jsonl(tmp_path / "talk.jsonl", [{"image": "a.png", "messages": talk}])
    folder = chartqa(tmp_path / "charts", [png()])
    made = rows(processor, (source("talk.jsonl", format="messages"), file), (source(), folder))
    assert made.form == "messages"
    assert [len(row["messages"]) for row in made.dataset] == [4, 2]
    assert made.dataset[0]["question"] == "And red?"
    assert made.dataset[0]["answers"] == ["One."]


def test_prompt_completion_as_texts_and_as_messages(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_bytes(png())
    plain = jsonl(
        tmp_path / "plain.jsonl", [{"image": "a.png", "prompt": "Two plus two?", "completion": "4"}]
    )
    talk = jsonl(
        tmp_path / "talk.jsonl",
        [
            {
                "image": "a.png",
                "prompt": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hi"},
                    {"role": "user", "content": "Two plus two?"},
                ],
                "completion": [{"role": "assistant", "content": "4"}],
            }
        ],
    )
    made = rows(
        processor,
        (source("plain.jsonl", format="prompt_completion"), plain),
        (source("talk.jsonl", format="prompt_completion"), talk),
    )
    assert made.form == "prompt_completion"  # answers in the prompt carry no loss
    assert texts(made.dataset[0]["prompt"]) == [("user", ["<image>", "Two plus two?"])]
    assert texts(made.dataset[1]["prompt"])[0] == ("user", ["<image>", "Hello"])
    assert [texts(row["completion"]) for row in made.dataset] == [[("assistant", ["4"])]] * 2


def test_a_class_that_is_missing_is_a_bad_row(tmp_path: Path, processor: ProcessorMixin) -> None:
    features = Features({"image": Image(), "query": Value("string"), "label": List(ClassLabel(names=["a"]))})
    columns = {"image": [{"bytes": png(), "path": None}] * 2, "query": ["?"] * 2, "label": [[0], [0, None]]}
    file = tmp_path / "classes.parquet"
    Dataset.from_dict(columns, features=features).to_parquet(file)
    named = source("classes", columns={"question": "query", "answer": "label"})
    with pytest.raises(DataError, match="row 1: empty answer"):
        rows(processor, (named, file))


def test_numbers_from_csv_become_text(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_bytes(png())
    file = tmp_path / "t.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(
            [["image", "question", "answer"], ["a.png", "2+2?", 4], ["a.png", "1/4?", 0.25]]
        )
    made = rows(processor, (source("t.csv", columns={}), file))
    assert [row["answers"] for row in made.dataset] == [["4"], ["0.25"]]
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(
            [["image", "question", "answer"], ["a.png", "2+2?", 4], ["a.png", "1/0?", ""]]
        )
    made = rows(processor, (source("t.csv", columns={}), file), on_bad_row="skip")
    assert [row["answers"] for row in made.dataset] == [["4"]]
    assert made.skipped == (("t.csv[train] row 1", "empty answer"),)


BAD_MESSAGES: list[tuple[list[dict[str, Any]], str]] = [
    ([], "messages is not a list of messages"),
    ([{"role": "user", "content": "?"}], "the last message is the user's"),
    ([{"role": "user", "content": "?"}, {"role": "assistant", "content": " "}], "empty answer"),
    ([{"role": "assistant", "content": "!"}], "1 images and no user message to show them"),
    (
        [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}],
        "control token '<image>'",
    ),
    ([{"role": "tool", "content": "?"}, {"role": "assistant", "content": "!"}], "has role 'tool'"),
    (
        [{"role": "user", "content": None}, {"role": "assistant", "content": "!"}],
        r"messages\[0\] has no content",
    ),
    (
        [
            {"role": "user", "content": "?"},
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "!"},
        ],
        "a system message that is not the first",
    ),
    (
        [{"role": "user", "content": "?", "name": "Ann"}, {"role": "assistant", "content": "!"}],
        "has name, which would be left out",
    ),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_messages_that_mean_nothing_are_named(
    messages: list[dict[str, Any]], reason: str, tmp_path: Path, processor: ProcessorMixin
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    good = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    entries = [{"image": "a.png", "messages": good}, {"image": "a.png", "messages": messages}]
    file = jsonl(tmp_path / "t.jsonl", entries)
    with pytest.raises(DataError, match=rf"t\.jsonl\[train\] row 1: .*{reason}"):
        rows(processor, (source("t.jsonl", format="messages"), file))


def test_image_parts_must_match_the_images(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_bytes(png())
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
    file = jsonl(
        tmp_path / "t.jsonl", [{"image": "a.png", "messages": [{"role": "user", "content": content}, answer]}]
    )
    with pytest.raises(DataError, match="1 images for 2 image parts"):
        rows(processor, (source("t.jsonl", format="messages"), file))


# --- sources ---


def test_splits_slices_and_subsets(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = chartqa(tmp_path / "charts", [png(seed) for seed in range(10)])
    sliced = rows(processor, (source(split="train[20%:70%]"), folder))
    assert sliced.dataset["question"][:] == [f"What is value {number}?" for number in range(2, 7)]
    assert sliced.dataset[0]["row"] == "charts[train[20%:70%]] row 0"
    drawn = rows(processor, (source(max_samples=4), folder), (source(max_samples=3), folder), max_samples=5)
    assert len(drawn.dataset) == 5
    assert drawn.dataset["index"][:] == [0, 1, 2, 3, 4]
    again = rows(processor, (source(max_samples=4), folder), (source(max_samples=3), folder), max_samples=5)
    other = rows(
        processor, (source(max_samples=4), folder), (source(max_samples=3), folder), seed=7, max_samples=5
    )
    assert drawn.fingerprint == again.fingerprint != other.fingerprint
    assert drawn.dataset["row"][:] == again.dataset["row"][:] != other.dataset["row"][:]
    first = drawn.dataset["question"][: len(drawn.dataset["row"][:])]
    assert len(set(first)) > 1


def test_fingerprint_is_of_content(tmp_path: Path, processor: ProcessorMixin) -> None:
    images = [png(0), png(1)]
    one = rows(processor, (source(), chartqa(tmp_path / "one", images)))
    moved = rows(processor, (source("elsewhere"), chartqa(tmp_path / "two", images)))
    changed = rows(processor, (source(), chartqa(tmp_path / "three", [png(0), png(2)])))
    reworded = rows(processor, (source(), chartqa(tmp_path / "four", images, label=[["0"], ["2"]])))
    assert len({one.fingerprint, changed.fingerprint, reworded.fingerprint}) == 3
    assert one.fingerprint == moved.fingerprint


def test_missing_columns_are_named_with_what_is_there(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = chartqa(tmp_path / "charts", [png()])
    with pytest.raises(DataError) as caught:
        rows(processor, (source(columns={"question": "querry", "answer": "label"}), folder))
    message = str(caught.value)
    assert (
        "datasets.train[0].columns: charts[train], read as vqa: no column 'querry' for the question"
        in message
    )
    assert "did you mean 'query'?" in message
    assert "image, query, label, human_or_machine" in message
    with pytest.raises(
        DataError, match=r"no column 'picture' for the image.*no column 'question' for the question"
    ):
        rows(processor, (source(columns={"image": "picture", "answer": "label"}), folder))


def test_unknown_split_is_answered_with_the_known_ones(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = chartqa(tmp_path / "charts", [png()])
    with pytest.raises(DataError, match=r"datasets\.eval\[0\]\.split.*the splits there are: train"):
        rows(processor, (source(split="test"), folder), name="eval")
    with pytest.raises(DataError, match=r"cannot take 'tain' of charts.*did you mean 'train'\?"):
        rows(processor, (source(split="tain"), folder))
    with pytest.raises(DataError, match="corresponds to no data"):
        rows(processor, (source(split="train[:0]"), folder))


def test_what_is_no_dataset(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"image": 1}\nnot json\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for name in ("gone", "empty", "t.txt", "bad.jsonl", "bad.parquet"):
        with pytest.raises(DataError, match=r"datasets\.train\[0\]\.path: "):
            rows(processor, (source(name), tmp_path / name))


def test_a_folder_of_pictures_with_a_table_wants_the_table_named(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(png())
    jsonl(tmp_path / "rows.jsonl", [{"image": "images/0.png", "question": "?", "answer": "!"}])
    with pytest.raises(DataError, match=r"path: here/rows\.jsonl"):
        rows(processor, (source("here", columns={}), tmp_path))
    # `data_files` says it as well.
    made = rows(processor, (source("here", columns={}, data_files="rows.jsonl"), tmp_path))
    assert len(made.dataset) == 1


def test_snapshot_of_a_hub_repository(tmp_path: Path, processor: ProcessorMixin) -> None:
    """Configurations and splits as its card names them; files as links, as in the hub's cache."""
    blobs = chartqa(tmp_path / "blobs", [png(0), png(1)]) / "data" / "train-00000-of-00001.parquet"
    snapshot = tmp_path / "snapshot"
    (snapshot / "human").mkdir(parents=True)
    (snapshot / "human" / "val-00000.parquet").symlink_to(blobs)
    (snapshot / "README.md").write_text(
        "---\nconfigs:\n- config_name: human\n  data_files:\n  - split: val\n    path: human/val-*\n---\n"
    )
    made = rows(processor, (source("who/Charts", name="human", split="val[:1]"), snapshot), name="eval")
    assert made.dataset["row"][:] == ["who/Charts:human[val[:1]] row 0"]
    with pytest.raises(DataError, match=r"datasets\.train\[0\]\.path: cannot read who/Charts:machine.*human"):
        rows(processor, (source("who/Charts", name="machine", split="val"), snapshot))


def test_urls_are_not_fetched(tmp_path: Path, processor: ProcessorMixin) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"image": "https://a.example/b.png", "question": "?", "answer": "!"}])
    with pytest.raises(DataError, match=r"image: not a file on this machine: https://a\.example/b\.png"):
        rows(processor, (source("t.jsonl", columns={}), file))


def test_image_folder_with_metadata(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "0.png").write_bytes(png())
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "question": "?", "answer": "!"}])
    assert len(rows(processor, (source("here", columns={}), tmp_path)).dataset) == 1


def test_column_that_holds_no_images(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = chartqa(tmp_path / "charts", [png()])
    with pytest.raises(DataError, match=r"column 'human_or_machine'.*it holds int64"):
        rows(processor, (source(columns={**COLUMNS, "image": "human_or_machine"}), folder))


@pytest.mark.parametrize("kind", ["struct", "bytes", "list of bytes", "list of images"])
def test_ways_to_store_images_in_parquet(kind: str, tmp_path: Path, processor: ProcessorMixin) -> None:
    feature: Any = {
        "struct": {"bytes": Value("binary"), "path": Value("string")},
        "bytes": Value("binary"),
        "list of bytes": List(Value("large_binary")),
        "list of images": List(Image()),
    }[kind]
    held: Any = {
        "struct": {"bytes": png(1), "path": "x.png"},
        "bytes": png(1),
        "list of bytes": [png(1)],
        "list of images": [{"bytes": png(1), "path": None}],
    }[kind]
    features = Features({"image": feature, "question": Value("string"), "answer": Value("string")})
    table = Dataset.from_dict({"image": [held], "question": ["?"], "answer": ["!"]}, features=features)
    table.to_parquet(tmp_path / "t.parquet")
    made = rows(processor, (source("t.parquet", columns={}), tmp_path / "t.parquet"))
    assert made.dataset[0]["images"][0]["bytes"] == png(1)


# --- bad rows (acceptance 9) ---

NASTY = {
    0: png(0),
    1: broken(),
    2: png(2),  # with an empty answer
    3: None,
    4: grey16(),
    5: palette(),
    6: cmyk(),
    7: sideways(),
}
BAD = {
    1: "image: corrupt: ",
    2: "empty answer",
    3: "no image",
}
CHANGED = {
    4: "16-bit grey scaled to 8 bits (mode I;16)",
    5: "converted to RGB (mode P)",
    6: "converted to RGB (mode CMYK)",
    7: "turned upright (EXIF orientation 6)",
}


def nasty(folder: Path) -> Path:
    answers = [["" if number == 2 else str(number)] for number in NASTY]
    return chartqa(folder, list(NASTY.values()), label=answers)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_every_bad_row_is_named_in_one_error(
    tmp_path: Path, processor: ProcessorMixin, num_proc: int | None
) -> None:
    with pytest.raises(DataError) as caught:
        rows(processor, (source(), nasty(tmp_path / "charts")), num_proc=num_proc)
    message = str(caught.value)
    assert message.startswith("datasets.train: 3 rows cannot be used:")
    assert "datasets.on_bad_row: skip" in message
    for number, reason in BAD.items():
        assert f"charts[train] row {number}: {reason}" in message
    assert "row 4" not in message


def test_bad_rows_are_skipped_by_name_and_the_rest_is_trained_on(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    made = rows(processor, (source(), nasty(tmp_path / "charts")), on_bad_row="skip")
    assert [name for name, _ in made.skipped] == [f"charts[train] row {number}" for number in BAD]
    for (_, said), reason in zip(made.skipped, BAD.values(), strict=True):
        assert said.startswith(reason)
    assert made.dataset["row"][:] == [f"charts[train] row {number}" for number in (0, 4, 5, 6, 7)]
    assert made.dataset["index"][:] == [0, 1, 2, 3, 4]
    assert sorted(made.notes) == sorted(
        f"datasets.train: 1 row: {note}: charts[train] row {number}" for number, note in CHANGED.items()
    )
    # Every one of them is trained on, as the picture that it shows.
    collator = Collator(processor, made.form, torch.float32)
    batch = collator([made.dataset[position] for position in range(5)])
    assert batch["pixel_values"].shape[:2] == (5, 1)
    assert (batch["labels"] != -100).any(dim=1).all()


def test_only_twenty_bad_rows_are_listed_and_all_are_counted(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    folder = chartqa(tmp_path / "charts", [None] * 25)
    with pytest.raises(DataError) as caught:
        rows(processor, (source(), folder))
    assert str(caught.value).count(": no image") == 20
    assert "25 rows" in str(caught.value)
    assert "and 5 more" in str(caught.value)
    with pytest.raises(DataError, match="no row is left to use"):
        rows(processor, (source(), folder), on_bad_row="skip")


def test_a_missing_file_is_found_even_when_the_table_was_checked_before(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    file = jsonl(tmp_path / "t.jsonl", [{"image": "a.png", "question": "?", "answer": "!"}])
    first = rows(processor, (source("t.jsonl", columns={}), file))
    (tmp_path / "a.png").write_bytes(png(2))
    assert rows(processor, (source("t.jsonl", columns={}), file)).fingerprint != first.fingerprint
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"t\.jsonl\[train\] row 0: image: no such file: .*a\.png"):
        rows(processor, (source("t.jsonl", columns={}), file))


def test_a_group_cannot_have_a_word_of_the_results(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_bytes(png())
    file = jsonl(
        tmp_path / "t.jsonl", [{"image": "a.png", "question": "?", "answer": "!", "group": "overall"}]
    )
    with pytest.raises(DataError, match="group 'overall'"):
        rows(processor, (source("t.jsonl", columns={}), file))


# --- tokens ---


def mixed_sizes(folder: Path) -> Path:
    sizes = [(48, 32), (200, 30), (30, 200), (300, 300), (128, 128), (500, 40), (100, 90), (64, 64)]
    questions = [f"{'word ' * number}?" for number in range(len(sizes))]
    return chartqa(folder, [png(0, *size) for size in sizes], query=questions)


@pytest.mark.parametrize(
    ("build", "way"), [(lambda base: base, "formula"), (llava_next, "formula"), (idefics2, "blank")]
)
def test_counted_tokens_are_the_collated_length(
    build: Any, way: str, tmp_path: Path, processor: ProcessorMixin
) -> None:
    made_by = build(processor)
    made = rows(made_by, (source(), mixed_sizes(tmp_path / "charts")))
    collator = Collator(made_by, made.form, torch.float32)
    lengths = [int(collator([row])["input_ids"].shape[1]) for row in made.dataset]
    assert made.dataset["tokens"][:] == lengths
    assert made.dataset["text_tokens"][:] == TokenCounter(collator, []).text_tokens(list(made.dataset))
    assert made.max_tokens == max(lengths)
    row = made.dataset[0]
    assert TokenCounter(collator, [Counted(row, [(32, 48)])]).way == way


def test_texts_are_counted_once_for_one_tokenizer_and_template(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chartqa(
        tmp_path / "charts", [png()] * 20, query=[f"{'word ' * number}?" for number in range(20)]
    )
    counted: list[int] = []
    count = TokenCounter.text_tokens

    def noted(self: TokenCounter, texts: Any) -> Any:
        counted.append(len(texts))
        return count(self, texts)

    monkeypatch.setattr(TokenCounter, "text_tokens", noted)

    def tokens(made_by: ProcessorMixin) -> list[int]:
        counted.clear()
        made = rows(made_by, (source(), folder))
        collator = Collator(made_by, made.form, torch.float32)
        found: list[int] = made.dataset["tokens"][:]
        assert found == [int(collator([row])["input_ids"].shape[1]) for row in made.dataset]
        return found

    first = tokens(processor)
    assert sum(counted) >= 20
    assert tokens(processor) == first
    assert 0 < sum(counted) < 20  # the probes alone
    other = copy.deepcopy(processor)
    other.chat_template = f"{other.chat_template}, by the way"
    assert all(more > fewer for more, fewer in zip(tokens(other), first, strict=True))


def test_texts_of_other_columns_are_counted_anew(processor: ProcessorMixin) -> None:
    """The same turns have one digest, as a prompt with its completion and as messages."""
    keys = [
        lengths._key(processor, columns, ["same"]) for columns in (["completion", "prompt"], ["messages"])
    ]
    assert keys[0] != keys[1] and None not in keys


def test_tokens_when_tiles_are_split(tmp_path: Path) -> None:
    split = smolvlm()
    split.image_processor.size = {"longest_edge": 512}
    made = rows(split, (source(), mixed_sizes(tmp_path / "charts")))
    collator = Collator(split, made.form, torch.float32)
    assert made.dataset["tokens"][:] == [int(collator([row])["input_ids"].shape[1]) for row in made.dataset]
    assert len(set(made.dataset["tokens"][:])) > 3


def test_tokens_of_several_turns(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = rows(processor, (source("talk.jsonl", format="messages"), talk(tmp_path)))
    collator = Collator(processor, made.form, torch.float32)
    assert made.dataset["tokens"][:] == [int(collator([row])["input_ids"].shape[1]) for row in made.dataset]


def talk(folder: Path) -> Path:
    said = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And red?"},
        {"role": "assistant", "content": "One."},
    ]
    (folder / "a.png").write_bytes(png())
    entries = [{"images": ["a.png"], "messages": said}, {"images": [], "messages": said}]
    return jsonl(folder / "talk.jsonl", entries)


def test_a_count_that_is_wrong_is_not_believed(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows(processor, (source(), mixed_sizes(tmp_path / "charts")))
    collator = Collator(processor, made.form, torch.float32)
    probes = [Counted(row, [size_of(row)]) for row in made.dataset]
    monkeypatch.setattr(TokenCounter, "_by_formula", lambda self, size: 1)
    assert TokenCounter(collator, probes).way == "blank"
    monkeypatch.setattr(TokenCounter, "_by_blank", lambda self, size: 2)
    counter = TokenCounter(collator, probes)
    assert counter.way == "real"
    assert counter.count(probes) == made.dataset["tokens"][:]


def size_of(row: Any) -> tuple[int, int]:
    return Pillow.open(io.BytesIO(row["images"][0]["bytes"])).size[::-1]


def test_long_rows_are_refused_dropped_or_named(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = chartqa(tmp_path / "charts", [png(), png()], query=["short?", "long " * 60])
    with pytest.raises(
        DataError, match=r"1 row with more than 64 tokens:\n  charts\[train\] row 1: 2\d\d tokens"
    ):
        rows(processor, (source(), folder), limit=64)
    dropped = rows(processor, (source(), folder), limit=64, on_overflow="drop")
    assert [name for name, _ in dropped.skipped] == ["charts[train] row 1"]
    assert len(dropped.dataset) == 1
    with pytest.raises(DataError, match=r"model\.processor\.size"):
        rows(processor, (source(), folder), limit=64, on_overflow="resize")


def test_images_are_shrunk_only_as_far_as_it_takes(tmp_path: Path, processor: ProcessorMixin) -> None:
    tiled = llava_next(processor)
    folder = chartqa(tmp_path / "charts", [png(0, 160, 160), png(0, 50, 50)])
    whole = rows(tiled, (source(), folder))
    limit = whole.max_tokens - 1
    fitted = rows(tiled, (source(), folder), limit=limit, on_overflow="resize")
    assert fitted.max_tokens <= limit < whole.max_tokens
    assert 0.3 < fitted.dataset[0]["scale"] < 1.0
    assert fitted.dataset[1]["scale"] == 1.0
    assert fitted.notes == (
        f"datasets.train: 1 row: images shrunk to fit {limit} tokens: charts[train] row 0",
    )
    assert fitted.fingerprint != whole.fingerprint
    lengths = [
        int(Collator(tiled, fitted.form, torch.float32)([row])["input_ids"].shape[1])
        for row in fitted.dataset
    ]
    assert fitted.dataset["tokens"][:] == lengths


def test_a_size_that_the_processor_refuses_is_a_bad_row(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(self: TokenCounter, size: tuple[int, int]) -> int:
        if size == (32, 48):
            raise ValueError("absolute aspect ratio")
        return 18

    monkeypatch.setattr(TokenCounter, "_by_formula", picky)
    folder = chartqa(tmp_path / "charts", [png(), png(0, 64, 64)])
    made: Rows = rows(processor, (source(), folder), on_bad_row="skip")
    assert made.skipped == (
        ("charts[train] row 0", "the processor refuses an image of 48 x 32: absolute aspect ratio"),
    )
