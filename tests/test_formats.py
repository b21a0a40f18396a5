"""What cauldron and llava rows mean, and rows with several images, one and none in one batch: labels decoded,
batches and tokens compared with what TRL really makes."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModelForImageTextToText, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from runner.demo import resolve_model
from runner.errors import DataError
from runner.train.data import turns
from runner.train.data.audit import audit
from runner.train.data.collator import Collator
from runner.train.data.formats import Converted, Reading, convert
from runner.train.data.rows import Rows
from runner.train.data.sources import image_lists, shown_images
from runner.train.data.turns import turn_template
from tests.samples import idefics2, jsonl, llava_next, picture, png, rows, smolvlm, source

END = "<end_of_utterance>\n"


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return smolvlm()


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(m["role"], [part["text"] or f"<{part['type']}>" for part in m["content"]]) for m in messages]


def learned(processor: ProcessorMixin, batch: dict[str, Any], row: int = 0) -> str:
    labels = batch["labels"][row]
    return str(processor.decode(labels[labels != -100]))


def side(number: int) -> tuple[int, int]:
    """Width and height of picture `number`; no two are alike."""
    return 40 + 30 * number, 60


def parquet(folder: Path, name: str, features: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    """A table whose `images` are given by number."""
    folder.mkdir(exist_ok=True)
    held = [
        {**row, "images": [{"bytes": png(n, *side(n)), "path": None} for n in row["images"]]}
        for row in entries
    ]
    table = Dataset.from_list(held, features=Features({"images": List(Image()), **features}))
    table.to_parquet(folder / name)
    return folder / name


TURN = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
PART = {"index": Value("int64"), "text": Value("string"), "type": Value("string")}


def cauldron(folder: Path, *entries: tuple[list[int], list[tuple[str | None, str | None]]]) -> Path:
    """As HuggingFaceM4/the_cauldron holds them: images, and turns of user and assistant."""
    made = [
        {"images": images, "texts": [{"user": u, "assistant": a, "source": "ai2d"} for u, a in turns]}
        for images, turns in entries
    ]
    return parquet(folder, "cauldron.parquet", {"texts": List(TURN)}, made)


def part(value: int | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        return {"index": None, "text": value, "type": "text"}
    return {"index": value, "text": None, "type": "image"}


def talk(*turns: list[int | str | None]) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn: a text is a text part, a number or None an image part."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": next(roles), "content": [part(value) for value in turn]} for turn in turns]


def said_by(*roles: str) -> list[dict[str, Any]]:
    """A word of each; an image before the first of the user's."""
    messages: list[dict[str, Any]] = [{"role": role, "content": [part("word")]} for role in roles]
    messages[roles.index("user")]["content"].insert(0, part(0))
    return messages


def llava(folder: Path, *entries: tuple[list[int], list[dict[str, Any]]]) -> Path:
    """As HuggingFaceH4/llava-instruct-mix-vsft holds them: images, and messages whose parts have an index."""
    features = {"messages": List({"role": Value("string"), "content": List(PART)})}
    made = [{"images": images, "messages": messages} for images, messages in entries]
    return parquet(folder, "llava.parquet", features, made)


def loaded(processor: ProcessorMixin, format: str, file: Path, **fields: Any) -> Rows:
    return rows(processor, (source(file.name, format=format), file), **fields)


def batch_of(made: Rows, collator: Collator) -> Any:
    return collator([made.dataset[position] for position in range(len(made.dataset))])


def plainly(processor: ProcessorMixin, *examples: tuple[list[int], list[dict[str, Any]]]) -> dict[str, Any]:
    """TRL's batch of conversations that somebody wrote for it by hand."""
    collator = DataCollatorForVisionLanguageModeling(
        processor, assistant_only_loss=True, chat_template=turn_template(processor)
    )
    batch: dict[str, Any] = collator(
        [{"images": [picture(*side(n), n) for n in images], "messages": said} for images, said in examples]
    )
    return batch


def said(*turns: str | list[Any]) -> list[dict[str, Any]]:
    roles = itertools.cycle(("user", "assistant"))
    return [
        {
            "role": next(roles),
            "content": [
                {"type": "image"} if one is None else {"type": "text", "text": one}
                for one in ([turn] if isinstance(turn, str) else turn)
            ],
        }
        for turn in turns
    ]


def assert_same(batch: dict[str, Any], plain: dict[str, Any]) -> None:
    assert set(batch) - {"row_index", "image_count"} == set(plain)
    for name, value in plain.items():
        assert torch.equal(batch[name], torch.as_tensor(value).to(batch[name].dtype)), name


# --- cauldron ---


def test_cauldron_turns_are_trls_bit_for_bit(tmp_path: Path, processor: ProcessorMixin) -> None:
    file = cauldron(
        tmp_path,
        ([0, 1], [("What differs?", "All."), ("Which is red?", "The left one."), ("Sure?", "Yes.")]),
        ([2], [("How many?", "Two.")]),
    )
    made = loaded(processor, "cauldron", file)
    assert made.form == "messages"
    row = made.dataset[0]
    assert texts(row["messages"])[0] == ("user", ["<image>", "<image>", "What differs?"])
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 3
    assert (row["question"], row["answers"], row["image_count"]) == ("Sure?", ["Yes."], 2)
    collator = Collator(processor, made.form, torch.float32)
    batch = batch_of(made, collator)
    plain = plainly(
        processor,
        (
            [0, 1],
            said([None, None, "What differs?"], "All.", "Which is red?", "The left one.", "Sure?", "Yes."),
        ),
        ([2], said([None, "How many?"], "Two.")),
    )
    assert_same(batch, plain)
    assert learned(processor, batch) == "".join(f" {one}{END}" for one in ("All.", "The left one.", "Yes."))
    assert learned(processor, batch, 1) == f" Two.{END}"
    assert len(audit(made, collator, processor, samples=2)) == 1 + (1 + 3 * 2) + (1 + 2)
    asked = processor.decode(collator.prompts([row])["input_ids"][0])
    assert asked.endswith(f"Sure?{END}Assistant:")
    sent = pickle.loads(pickle.dumps(collator))  # to a loader's worker
    assert torch.equal(batch_of(made, sent)["labels"], batch["labels"])


def test_one_turn_of_cauldron_is_prompt_and_completion(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = loaded(processor, "cauldron", cauldron(tmp_path, ([0], [("How many?", "Two.")])))
    assert made.form == "prompt_completion"
    assert texts(made.dataset[0]["prompt"]) == [("user", ["<image>", "How many?"])]
    assert texts(made.dataset[0]["completion"]) == [("assistant", ["Two."])]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "texts is not a list of turns"),
        ([("How many?", "Two."), ("", "Yes.")], r"empty texts\[1\]\.user"),
        ([("How many?", None)], r"empty texts\[0\]\.assistant"),
        ([("<image>How many?", "Two.")], "the user's text contains the control token '<image>'"),
    ],
)
def test_cauldron_rows_that_mean_nothing_are_named(
    turns: list[Any], reason: str, tmp_path: Path, processor: ProcessorMixin
) -> None:
    file = cauldron(tmp_path, ([0], [("?", "!")]), ([0], turns))
    with pytest.raises(DataError, match=rf"cauldron\.parquet\[train\] row 1: {reason}"):
        loaded(processor, "cauldron", file)


# --- llava ---

READING = Reading("llava", {"messages": "messages"}, None, None, {}, "<image>")


def shown(*parts: int | str | None, images: int = 2) -> Converted:
    return convert({"messages": talk([*parts, "?"], ["!"])}, images, READING)


@pytest.mark.parametrize(
    ("parts", "images", "order"),
    [
        ([], 2, [0, 1]),
        ([None, None], 2, [0, 1]),
        ([0, 1], 2, [0, 1]),
        ([1, "and", 0], 2, [1, 0]),
        ([0, 0], 1, [0, 0]),
        ([], 0, []),
    ],
)
def test_image_parts_show_images_by_their_index(parts: list[Any], images: int, order: list[int]) -> None:
    made = shown(*parts, images=images)
    assert (made["problem"], made["shown"]) == (None, order)
    places = [one for message in made["messages"] for one in message["content"] if one["type"] == "image"]
    assert len(places) == len(order)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([0, None], "some image parts have an index and some have none"),
        ([0, 2], "an image part names image 2, and the row has 2, counted from 0"),
        ([0, -1], "an image part names image -1, and the row has 2, counted from 0"),
        ([1], "no part shows image 0 of 2, counted from 0"),
        ([None], "2 images for 1 image parts"),
    ],
)
def test_an_index_that_means_nothing_is_named(parts: list[Any], reason: str) -> None:
    assert shown(*parts)["problem"] == reason


@pytest.mark.parametrize(("parts", "problem"), [([0, 1], False), ([None, None], False), ([1, 0], True)])
@pytest.mark.parametrize("format", ["messages", "prompt_completion"])
def test_an_index_is_not_passed_over(format: Any, parts: list[Any], problem: bool) -> None:
    """Other formats show images in their order, and would show these in another one than the row says."""
    asked, answer = talk([*parts, "?"], ["!"])
    row = {"messages": [asked, answer], "prompt": [asked], "completion": "!"}
    reading = Reading(format, {name: name for name in row}, None, None, {}, "<image>")
    said = "its image parts name the images 1, 0: only format llava reads the index"
    assert convert(row, 2, reading)["problem"] == (said if problem else None)


ALTERNATING = """
{%- for message in messages -%}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}
{{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif -%}
{{ message.role }}:{% for part in message.content %}{{ part.text or "<image>" }}{% endfor %}<end_of_utterance>
{%- endfor -%}
{%- if add_generation_prompt %}assistant:{% endif -%}
"""
"""As Gemma 3 and Mistral have it."""


@pytest.mark.parametrize(
    ("template", "roles", "reason"),
    [
        (ALTERNATING, ("user", "user", "assistant"), "chat template refuses it: .*alternate"),
        (ALTERNATING, ("user", "assistant", "assistant"), "chat template refuses it: .*alternate"),
        (None, ("assistant", "user", "assistant"), "it begins with an answer to nothing"),
    ],
)
def test_turns_that_the_template_does_not_take_are_a_bad_row(
    template: str | None, roles: tuple[str, ...], reason: str, tmp_path: Path, processor: ProcessorMixin
) -> None:
    made_by = idefics2(processor)
    made_by.chat_template = template or made_by.chat_template
    file = llava(tmp_path, ([0], talk([0, "?"], ["!"])), ([0], said_by(*roles)))
    with pytest.raises(DataError, match=rf"llava\.parquet\[train\] row 1: .*{reason}"):
        loaded(made_by, "llava", file)
    assert loaded(made_by, "llava", file, on_bad_row="skip").dataset["index"][:] == [0]


def test_a_wrong_index_names_the_row(tmp_path: Path, processor: ProcessorMixin) -> None:
    file = llava(tmp_path, ([0], talk([0, "?"], ["!"])), ([0], talk([1, "?"], ["!"])))
    with pytest.raises(DataError, match=r"llava\.parquet\[train\] row 1: an image part names image 1"):
        loaded(processor, "llava", file)
    kept = loaded(processor, "llava", file, on_bad_row="skip")
    assert kept.dataset["row"][:] == ["llava.parquet[train] row 0"]


LLAVA = (
    ([0, 1], talk([1, "This one,", 0, "and that?"], ["Alike."], ["Why?"], ["Both are noise."])),
    ([2, 3], talk([0, "What?"], ["Noise."], ["And", 1], ["As well."])),
    ([1], talk([0, 0, "Twice?"], ["Yes."], ["Sure?"], ["Quite."])),
)
"""The second image first, text before an image; an image in a later turn; one shown twice."""
WRITTEN = (
    ([1, 0], said([None, "This one,", None, "and that?"], "Alike.", "Why?", "Both are noise.")),
    ([2, 3], said([None, "What?"], "Noise.", ["And", None], "As well.")),
    ([1, 1], said([None, None, "Twice?"], "Yes.", "Sure?", "Quite.")),
)
"""The same for plain TRL."""
LEARNED = [f" Alike.{END} Both are noise.{END}", f" Noise.{END} As well.{END}", f" Yes.{END} Quite.{END}"]


@pytest.mark.parametrize("build", [lambda base: base, llava_next])
def test_llava_turns_are_trls_bit_for_bit(build: Any, tmp_path: Path, processor: ProcessorMixin) -> None:
    made_by = build(processor)
    made = loaded(made_by, "llava", llava(tmp_path, *LLAVA))
    batch = batch_of(made, Collator(made_by, made.form, torch.float32))
    assert_same(batch, plainly(made_by, *WRITTEN))
    assert [learned(made_by, batch, n) for n in range(3)] == LEARNED
    assert batch["image_count"].tolist() == made.dataset["image_count"][:] == [2, 2, 2]
    assert made.dataset["tokens"][:] == batch["attention_mask"].sum(dim=1).tolist()


def test_turns_are_found_where_upstream_loses_them(tmp_path: Path, processor: ProcessorMixin) -> None:
    """Fails when transformers repairs Idefics2, and `turns._said` can go."""
    made_by = idefics2(processor)
    made = loaded(made_by, "llava", llava(tmp_path, *LLAVA))
    collator = Collator(made_by, made.form, torch.float32)
    batch, plain = batch_of(made, collator), plainly(made_by, *WRITTEN)
    assert (plain["labels"] == made_by.image_token_id).any()
    assert_same({**batch, "labels": plain["labels"]}, plain)
    assert [learned(made_by, batch, n) for n in range(3)] == LEARNED
    assert audit(made, collator, made_by)


@pytest.mark.parametrize("build", [lambda base: base, llava_next])
def test_turns_are_found_where_upstream_finds_them(
    build: Any, tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = build(processor)
    made = loaded(made_by, "llava", llava(tmp_path, *LLAVA))
    monkeypatch.setattr(turns, "_tells_expansions", lambda processor: False)
    assert_same(batch_of(made, Collator(made_by, made.form, torch.float32)), plainly(made_by, *WRITTEN))


def test_turns_that_cannot_be_found_are_refused(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles with line breaks between them, which are text to whoever is not told."""
    split = smolvlm()
    split.image_processor.size = {"longest_edge": 256}
    made = loaded(split, "llava", llava(tmp_path, *LLAVA))
    assert [learned(split, batch_of(made, Collator(split, made.form, torch.float32)), 0)] == LEARNED[:1]
    monkeypatch.setattr(turns, "_tells_expansions", lambda processor: False)
    with pytest.raises(DataError, match="text of its own among the image tokens"):
        batch_of(made, Collator(split, made.form, torch.float32))


@pytest.mark.parametrize("build", [lambda base: base, llava_next, idefics2])
def test_turns_are_found_without_marks(build: Any, tmp_path: Path, processor: ProcessorMixin) -> None:
    """A template that TRL knows no marked edition of."""
    made_by = build(copy.copy(processor))
    shouted = processor.chat_template.replace("capitalize", "upper").replace("Assistant:", "ASSISTANT:")
    made_by.chat_template = shouted
    made = loaded(made_by, "llava", llava(tmp_path, *LLAVA))
    collator = Collator(made_by, made.form, torch.float32)
    batch = batch_of(made, collator)
    assert "USER:" in made_by.decode(batch["input_ids"][0])
    assert [learned(made_by, batch, n) for n in range(3)] == LEARNED
    assert not audit(made, collator, made_by)[-1].startswith("warning")


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, processor: ProcessorMixin) -> None:
    """As those do that drop the thoughts of earlier answers."""
    forgetful = copy.copy(processor)
    forgetful.chat_template = processor.chat_template.replace(
        "{{line['text']}}", "{{line['text'] if message == messages[-1] else 'No'}}"
    )
    with pytest.raises(DataError, match=r"writes a turn otherwise.*generation.*chat_template\.jinja"):
        loaded(forgetful, "llava", llava(tmp_path, *LLAVA))


def test_the_order_of_images_is_part_of_the_content(tmp_path: Path, processor: ProcessorMixin) -> None:
    one = loaded(processor, "llava", llava(tmp_path / "one", ([0, 1], talk([0, 1, "?"], ["!"]))))
    other = loaded(processor, "llava", llava(tmp_path / "other", ([0, 1], talk([1, 0, "?"], ["!"]))))
    assert one.fingerprint != other.fingerprint


def test_only_chunks_in_another_order_are_copied() -> None:
    stored = [[b"a", b"b"], [], [b"c"], [b"d", b"e"]]
    column = pa.chunked_array([stored[:2], stored[2:]], pa.list_(pa.binary()))
    lists = image_lists(column, "", "images")
    moved = shown_images(lists, [[0, 1], [], [], [1, 0, 1]])
    assert [[one["bytes"] for one in row] for row in moved.to_pylist()] == [
        [b"a", b"b"],
        [],
        [],  # a row that is not used
        [b"e", b"d", b"e"],
    ]
    addresses = [chunk.values.field("bytes").buffers()[2].address for chunk in lists.chunks]
    assert moved.chunks[0].values.field("bytes").buffers()[2].address == addresses[0]
    sliced = shown_images(lists.slice(1), [[], [0], [1, 0]])
    assert [[one["bytes"] for one in row] for row in sliced.to_pylist()] == [[], [b"c"], [b"e", b"d"]]


# --- several images, one, none ---


def mixed(folder: Path, turns: int) -> Path:
    """Rows with two, no, one and no image, of so many turns."""

    def spoken(name: str) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": role, "content": f"{name} {role} {turn}"} for turn in range(turns) for role in roles]

    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number, *side(number)))
    entries = [
        {"images": ["0.png", "1.png"], "messages": spoken("both")},
        {"images": [], "messages": spoken("bare")},
        {"images": ["2.png"], "messages": spoken("one")},
        {"images": [], "messages": spoken("text")},
    ]
    return jsonl(folder / "mixed.jsonl", entries)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("build", [lambda base: base, llava_next, idefics2])
def test_rows_with_and_without_images_go_into_one_batch(
    build: Any, turns: int, tmp_path: Path, processor: ProcessorMixin
) -> None:
    """In every order, each row with the ids, the labels and the tokens that it has alone."""
    made_by = build(processor)
    made = loaded(made_by, "messages", mixed(tmp_path, turns))
    assert made.form == ("prompt_completion" if turns == 1 else "messages")
    collator = Collator(made_by, made.form, torch.float32)
    assert audit(made, collator, made_by, samples=4)
    alone = [collator([row]) for row in made.dataset]
    assert made.dataset["tokens"][:] == [one["input_ids"].shape[1] for one in alone]
    assert ["pixel_values" in one for one in alone] == [True, False, True, False]
    for names in (*itertools.permutations(range(4), 3), (1, 3)):
        batch = collator([made.dataset[position] for position in names])
        assert sorted(batch["row_index"].tolist()) == sorted(names)
        assert batch["image_count"].tolist() == [[2, 0, 1, 0][row] for row in batch["row_index"]]
        for place, row in enumerate(batch["row_index"].tolist()):
            there = batch["attention_mask"][place] == 1
            assert torch.equal(batch["input_ids"][place][there], alone[row]["input_ids"][0])
            assert torch.equal(batch["labels"][place][there], alone[row]["labels"][0])
        asked = collator.prompts([made.dataset[position] for position in names])
        assert asked["row_index"].tolist() == list(names)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_mixed_batch_has_the_loss_of_its_rows(
    turns: int, tmp_path: Path, processor: ProcessorMixin
) -> None:
    """The model puts every image where its row is, and does without where there is none (float32)."""
    made = loaded(processor, "messages", mixed(tmp_path, turns))
    collator = Collator(processor, made.form, torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(
        resolve_model("demo:smolvlm-tiny"), dtype=torch.float32
    ).eval()

    def summed(positions: tuple[int, ...]) -> float:
        batch = collator([made.dataset[position] for position in positions])
        inputs = {name: value for name, value in batch.items() if name not in ("row_index", "image_count")}
        with torch.no_grad():
            loss = model(**inputs).loss
        return float(loss) * int((batch["labels"][:, 1:] != -100).sum())

    alone = [summed((position,)) for position in range(4)]
    assert len({round(loss, 3) for loss in alone}) == 4
    for positions in ((0, 1, 2, 3), (1, 2), (1, 3)):
        assert summed(positions) == pytest.approx(sum(alone[p] for p in positions), rel=1e-5)


def test_a_source_of_text_goes_with_one_of_images(tmp_path: Path, processor: ProcessorMixin) -> None:
    spoken = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    file = jsonl(tmp_path / "bare.jsonl", [{"messages": spoken}] * 3)
    bare = source("bare.jsonl", format="messages", max_samples=2), file
    shown = source("cauldron.parquet", format="cauldron"), cauldron(tmp_path, ([0], [("?", "!")]))
    made = rows(processor, bare, shown)
    assert made.dataset["image_count"][:] == [0, 0, 1]
    assert made.notes == ("datasets.train[0]: bare.jsonl[train] has no column of images: its rows are text",)
    assert made.dataset["pictures"][:2] == [None, None]  # they show nothing in common
    collator = Collator(processor, made.form, torch.float32)
    assert audit(made, collator, processor)
    assert made.dataset["tokens"][:] == batch_of(made, collator)["attention_mask"].sum(dim=1).tolist()


def test_images_under_another_name_are_missed(tmp_path: Path, processor: ProcessorMixin) -> None:
    file = cauldron(tmp_path, ([0], [("?", "!")]))
    Dataset.from_parquet(str(file)).rename_column("images", "pictures").to_parquet(file)
    with pytest.raises(DataError, match=r"no column 'image' for the image.*pictures"):
        loaded(processor, "cauldron", file)
    named = rows(processor, (source(file.name, format="cauldron", columns={"images": "pictures"}), file))
    assert named.dataset["image_count"][:] == [1]


# --- what does not change ---


@pytest.mark.parametrize(
    ("format", "row", "digest"),
    [
        ("vqa", {"question": "How many?", "answer": ["2", "two"]}, "b6537bd0a99f1f43"),
        ("caption", {"caption": "Noise."}, "f04c024e3a6547cc"),
        ("messages", {"messages": talk([None, "?"], ["!"])}, "2e9d1816c6d20eb2"),
        ("prompt_completion", {"prompt": "How many?", "completion": "2"}, "fda71cc70a4897be"),
    ],
)
def test_rows_keep_the_digest_that_checkpoints_know_them_by(
    format: Any, row: dict[str, Any], digest: str
) -> None:
    """A run of an older version finds its rows again; change one of these together with `VERSION` only."""
    reading = Reading(format, {name: name for name in row}, "Be short.", "Describe.", {}, "<image>")
    assert convert(row, 1, reading)["digest"][:16] == digest
