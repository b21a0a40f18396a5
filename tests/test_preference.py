"""Pairs of answers: two formats, one shape; batches that are TRL's bit for bit; an audit of both answers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from runner.errors import DataError
from runner.train.data.audit import audit
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from tests.samples import (
    idefics2,
    jsonl,
    llava_next,
    picture,
    png,
    rlaif_v,
    rlaif_v_formatted,
    rows,
    smolvlm,
    source,
)

END = "<end_of_utterance>\n"


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return smolvlm()


def pairs(folder: Path, processor: ProcessorMixin, count: int = 3, **fields: Any) -> Rows:
    made = rlaif_v(folder / "pairs", [png(number, 40 + 30 * number, 60) for number in range(count)])
    return rows(processor, (source("pairs", format="preference", **fields), made))


def batch_of(made: Rows, collator: Collator) -> Any:
    return collator([made.dataset[position] for position in range(len(made.dataset))])


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(m["role"], [part["text"] or f"<{part['type']}>" for part in m["content"]]) for m in messages]


# --- formats ---


def test_a_pair_in_rlaif_vs_columns(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = pairs(tmp_path, processor, system_prompt="Be short.")
    assert made.form == "preference"
    row = made.dataset[1]
    assert texts(row["prompt"]) == [("system", ["Be short."]), ("user", ["<image>", "What is value 1?"])]
    assert texts(row["chosen"]) == [("assistant", ["It is 1."])]
    assert texts(row["rejected"]) == [("assistant", ["I see many, and a red bar."])]
    assert (row["question"], row["answers"], row["group"]) == ("What is value 1?", ["It is 1."], None)
    assert (row["row"], row["index"], row["image_count"], row["scale"]) == ("pairs[train] row 1", 1, 1, 1.0)
    assert {*made.dataset.column_names} == {
        *("images", "prompt", "chosen", "rejected", "question", "answers", "group"),
        *("row", "index", "image_count", "tokens", "text_tokens", "scale", "pixels", "pictures", "digest"),
    }


def test_both_formats_make_the_same_pairs(tmp_path: Path, processor: ProcessorMixin) -> None:
    flat = pairs(tmp_path, processor)
    held = [[png(number, 40 + 30 * number, 60)] for number in range(3)]
    folder = rlaif_v_formatted(tmp_path / "formatted", held)
    formatted = rows(processor, (source("formatted", format="preference_messages"), folder))
    assert formatted.fingerprint == flat.fingerprint
    assert [formatted.dataset[n]["rejected"] for n in range(3)] == [
        flat.dataset[n]["rejected"] for n in range(3)
    ]


def test_pairs_as_texts_and_as_messages_with_texts(tmp_path: Path, processor: ProcessorMixin) -> None:
    """As trl-lib writes them; several images, none, and an answer in the prompt, which carries no loss."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(len(name)))

    def said(*texts: str) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]

    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "4"), ("rejected", "5"))
    }
    talk = jsonl(
        tmp_path / "talk.jsonl",
        [
            {"images": ["a.png", "b.png"], "prompt": said("Hello", "Hi", "Two plus two?"), **answers},
            {"images": [], "prompt": said("Two plus two?"), **answers},
        ],
    )
    plain = jsonl(
        tmp_path / "plain.jsonl",
        [{"image": "a.png", "prompt": "Two plus two?", "chosen": "4", "rejected": "5"}],
    )
    made = rows(
        processor,
        (source("talk.jsonl", format="preference_messages"), talk),
        (source("plain.jsonl", format="preference_messages"), plain),
    )
    assert texts(made.dataset[0]["prompt"])[0] == ("user", ["<image>", "<image>", "Hello"])
    assert [made.dataset[n]["image_count"] for n in range(3)] == [2, 0, 1]
    assert texts(made.dataset[2]["prompt"]) == [("user", ["<image>", "Two plus two?"])]
    collator = Collator(processor, made.form, torch.float32)
    assert audit(made, collator, processor)
    batch = batch_of(made, collator)
    assert batch["image_count"].tolist() == [2, 0, 1]
    assert [learned(processor, batch, n) for n in range(6)] == [f" 4{END}"] * 3 + [f" 5{END}"] * 3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chosen": " "}, "empty chosen"),
    ({"rejected": None}, "empty rejected"),
    ({"question": ""}, "empty question"),
    ({"rejected": "It is 1. "}, "chosen and rejected are the same: there is nothing to prefer"),
    ({"rejected": "<image>"}, "the assistant's text contains the control token '<image>'"),
    ({"image": None}, "no image"),
]


@pytest.mark.parametrize(("wrong", "reason"), BAD)
def test_pairs_that_mean_nothing_are_named(
    wrong: dict[str, Any], reason: str, tmp_path: Path, processor: ProcessorMixin
) -> None:
    second = {"question": "?", "chosen": "It is 1.", "rejected": "No.", "image": png(), **wrong}
    texts = {name: ["first", second[name]] for name in ("question", "rejected")}
    folder = rlaif_v(
        tmp_path / "pairs", [png(), second["image"]], chosen=["It is 0.", second["chosen"]], **texts
    )
    with pytest.raises(DataError, match=rf"pairs\[train\] row 1: {reason}"):
        rows(processor, (source("pairs", format="preference"), folder))


SAID = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
ASKED = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"chosen": [ASKED, SAID]}, "chosen is one assistant message, not: user, assistant"),
        ({"rejected": [SAID, SAID]}, "rejected is one assistant message, not: assistant, assistant"),
        ({"rejected": []}, "rejected is not a list of messages"),
        ({"prompt": [ASKED, SAID]}, "the last message of prompt is the assistant's, not the user's"),
        ({"prompt": [{"role": "user", "content": []}]}, r"prompt\[0\] has no content"),
        ({"rejected": [{"role": "assistant", "content": [{"type": "image", "text": None}]}]}, "is an image"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]},
            "empty chosen",
        ),
    ],
)
def test_messages_that_are_no_pair_are_named(
    wrong: dict[str, Any], reason: str, tmp_path: Path, processor: ProcessorMixin
) -> None:
    columns = {name: [value] for name, value in wrong.items()}
    folder = rlaif_v_formatted(tmp_path / "pairs", [[png()]], **columns)
    with pytest.raises(DataError, match=rf"pairs\[train\] row 0: .*{reason}"):
        rows(processor, (source("pairs", format="preference_messages"), folder))


# --- batches ---


def learned(processor: ProcessorMixin, batch: dict[str, Any], row: int) -> str:
    return str(processor.decode(batch["input_ids"][row][batch["completion_mask"][row] == 1]))


def said_plainly(role: str, text: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("build", [lambda base: base, llava_next, idefics2])
def test_batch_of_pairs_is_trls_bit_for_bit(build: Any, tmp_path: Path, processor: ProcessorMixin) -> None:
    made_by = build(processor)
    made = pairs(tmp_path, made_by)
    batch = batch_of(made, Collator(made_by, made.form, torch.float32))
    plain = DataCollatorForVisionPreference(made_by)(
        [
            {
                "images": [picture(40 + 30 * number, 60, number)],
                "prompt": said_plainly("user", f"What is value {number}?"),
                "chosen": said_plainly("assistant", f"It is {number}."),
                "rejected": said_plainly("assistant", "I see " + "many, " * number + "and a red bar."),
            }
            for number in range(3)
        ]
    )
    assert set(batch) - {"row_index", "image_count"} == set(plain)
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name
    assert batch["row_index"].tolist() == [0, 1, 2]
    assert batch["image_count"].tolist() == [1, 1, 1]
    sent = pickle.loads(pickle.dumps(Collator(made_by, made.form, torch.float32)))  # to a loader's worker
    assert torch.equal(batch_of(made, sent)["completion_mask"], batch["completion_mask"])


def test_both_answers_carry_loss_and_nothing_else(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = pairs(tmp_path, processor)
    batch = batch_of(made, Collator(processor, made.form, torch.bfloat16))
    assert batch["input_ids"].shape == batch["completion_mask"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[0] == 6
    assert [learned(processor, batch, n) for n in range(3)] == [f" It is {n}.{END}" for n in range(3)]
    assert learned(processor, batch, 4) == f" I see many, and a red bar.{END}"
    assert not (batch["input_ids"][batch["completion_mask"] == 1] == processor.image_token_id).any()
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["pixel_attention_mask"].dtype == torch.bool
    assert batch["pixel_values"].shape[0] == 6  # TRL's: every image twice


def test_generation_begins_where_both_answers_do(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = pairs(tmp_path, processor)
    collator = Collator(processor, made.form, torch.float32)
    examples = [made.dataset[position] for position in range(3)]
    asked = collator.prompts(examples)
    assert asked["attention_mask"][:, -1].all()  # padded left
    assert asked["pixel_values"].shape[0] == 3
    assert "completion_mask" not in asked
    for number, row in enumerate(examples):
        trained = collator([row])
        shown = asked["input_ids"][number][asked["attention_mask"][number] == 1]
        for half in range(2):
            kept = (trained["completion_mask"][half] == 0) & (trained["attention_mask"][half] == 1)
            assert torch.equal(trained["input_ids"][half][kept], shown)


@pytest.mark.parametrize("build", [lambda base: base, llava_next, idefics2])
def test_tokens_are_those_of_the_longer_sequence(
    build: Any, tmp_path: Path, processor: ProcessorMixin
) -> None:
    made_by = build(processor)
    folder = rlaif_v(
        tmp_path / "pairs",
        [png(0, 200, 60), png(1), png(2, 90, 160)],
        chosen=["long " * 20, "short", "x"],
        rejected=["short", "long " * 20, "y"],
    )
    made = rows(made_by, (source("pairs", format="preference"), folder))
    collator = Collator(made_by, made.form, torch.float32)
    lengths = [int(collator([row])["input_ids"].shape[1]) for row in made.dataset]
    assert made.dataset["tokens"][:] == lengths
    assert made.max_tokens == max(lengths)


def test_a_pair_too_long_by_its_rejected_answer(tmp_path: Path, processor: ProcessorMixin) -> None:
    folder = rlaif_v(tmp_path / "pairs", [png(), png()], rejected=["No.", "long " * 60])
    made = source("pairs", format="preference")
    with pytest.raises(DataError, match=r"1 row with more than 64 tokens:\n  pairs\[train\] row 1: "):
        rows(processor, (made, folder), limit=64)
    dropped = rows(processor, (made, folder), limit=64, on_overflow="drop")
    assert dropped.dataset["row"][:] == ["pairs[train] row 0"]


def test_another_rejected_answer_is_other_data(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = source("pairs", format="preference")
    one = rows(processor, (made, rlaif_v(tmp_path / "one", [png()], rejected=["No."])))
    other = rows(processor, (made, rlaif_v(tmp_path / "other", [png()], rejected=["Never."])))
    assert one.fingerprint != other.fingerprint


# --- the audit ---


def test_audit_prints_both_answers(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = pairs(tmp_path, processor)
    lines = audit(made, Collator(processor, made.form, torch.float32), processor)
    assert lines[0] == "label audit: 3 of 3 rows"
    row = lines.index(next(line for line in lines if "row 1" in line))
    tokens = made.dataset[1]["tokens"]
    assert lines[row].startswith(f"  pairs[train] row 1: {tokens} tokens, 1 images, ")
    assert lines[row + 1].startswith("    prompt ends  ")
    assert lines[row + 1].endswith("What is value 1?<end_of_utterance>\\nAssistant:'")
    assert lines[row + 2] == "    chosen       ' It is 1.<end_of_utterance>\\n'"
    assert lines[row + 3] == "    rejected     ' I see many, and a red bar.<end_of_utterance>\\n'"
    assert "prompt ends" not in lines[row + 4]


def without_rejected(batch: dict[str, Any]) -> None:
    batch["completion_mask"][1:] = 0


def with_the_prompt(batch: dict[str, Any]) -> None:
    start = int((batch["completion_mask"][0] == 1).nonzero()[0])
    batch["completion_mask"][:, start - 4 : start] = 1


def with_the_image(batch: dict[str, Any]) -> None:
    batch["completion_mask"][0] |= batch["input_ids"][0] == 4


def with_padding(batch: dict[str, Any]) -> None:
    batch["completion_mask"][0] |= batch["attention_mask"][0] == 0


def exchanged(batch: dict[str, Any]) -> None:
    for name in ("input_ids", "completion_mask", "attention_mask"):
        batch[name] = batch[name].flip(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_rejected, "rejected: nothing carries loss"),
        (with_the_prompt, "rejected: the prompt carries loss"),
        (with_the_image, r"chosen: \d+ image tokens carry loss"),
        (with_padding, r"chosen: \d+ tokens of padding carry loss"),
        (exchanged, "chosen: the loss is on ' I see and a red bar"),
    ],
)
def test_audit_refuses_wrong_masks(
    change: Any, reason: str, tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pairs(tmp_path, processor, count=1)
    genuine = Collator.__call__

    def changed(self: Collator, batch: Any) -> Any:
        out = genuine(self, batch)
        change(out)
        return out

    monkeypatch.setattr(Collator, "__call__", changed)
    with pytest.raises(DataError, match=rf"pairs\[train\] row 0: {reason}"):
        audit(made, Collator(processor, made.form, torch.float32), processor)
