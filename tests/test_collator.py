"""Batches: TRL's own, bit for bit, labels that the audit accepts, and an audit that notices when they are
wrong."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from runner.errors import DataError
from runner.train.data.audit import audit
from runner.train.data.collator import Collator
from runner.train.data.rows import Rows
from runner.train.data.turns import turn_template
from tests.samples import chartqa, idefics2, llava_next, picture, png, rows, smolvlm, source

OURS = {"row_index", "image_count"}


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return smolvlm()


def charts(folder: Path, processor: ProcessorMixin, count: int = 5, **fields: Any) -> Rows:
    images = [png(number, 40 + 9 * number, 60) for number in range(count)]
    questions = [f"{'very ' * number}long question?" for number in range(count)]
    answers = [["12"], ["Yes, at all times"], ["3"], ["4"], ["5"]][:count]
    made = chartqa(folder / "charts", images, query=questions, label=answers)
    return rows(processor, (source(system_prompt="Be short.", **fields), made))


def talk(folder: Path, *, bare: int = 0) -> Path:
    """Two conversations of two and three turns with a picture each, and `bare` without one."""

    def said(turns: int) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": role, "content": f"{role} says {turn}"} for turn in range(turns) for role in roles]

    (folder / "a.png").write_bytes(png(7))
    entries = [{"images": ["a.png"], "messages": said(turns)} for turns in (2, 3)]
    entries += [{"images": [], "messages": said(2)}] * bare
    file = folder / "talk.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def example(number: int, image: Image.Image, question: str, answer: str) -> dict[str, Any]:
    """The row as somebody writes it for plain TRL."""
    return {
        "images": [image],
        "prompt": [
            {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        ],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
    }


@pytest.mark.parametrize("build", [lambda base: base, llava_next, idefics2])
def test_batch_is_trls_bit_for_bit(build: Any, tmp_path: Path, processor: ProcessorMixin) -> None:
    made_by = build(processor)
    made = charts(tmp_path, made_by)
    batch = Collator(made_by, made.form, torch.float32)([made.dataset[position] for position in range(5)])
    plain = DataCollatorForVisionLanguageModeling(made_by, max_length=None, completion_only_loss=True)(
        [
            example(
                number,
                picture(40 + 9 * number, 60, number),
                f"{'very ' * number}long question?",
                made.dataset[number]["answers"][0],
            )
            for number in range(5)
        ]
    )
    assert set(batch) - OURS == set(plain)
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name
    assert batch["row_index"].tolist() == [0, 1, 2, 3, 4]
    assert batch["image_count"].tolist() == [1] * 5


def test_several_turns_are_trls_bit_for_bit(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = rows(processor, (source("talk.jsonl", format="messages"), talk(tmp_path)))
    batch = Collator(processor, made.form, torch.float32)([made.dataset[0], made.dataset[1]])
    written = json.loads(f"[{','.join((tmp_path / 'talk.jsonl').read_text().splitlines())}]")
    plain = DataCollatorForVisionLanguageModeling(
        processor, assistant_only_loss=True, chat_template=turn_template(processor)
    )([{"images": [picture(seed=7)], "messages": entry["messages"]} for entry in written])
    for name, value in plain.items():
        assert torch.equal(batch[name], torch.as_tensor(value).to(batch[name].dtype)), name


def learned(processor: ProcessorMixin, batch: dict[str, Any], row: int = 0) -> str:
    labels = batch["labels"][row]
    return str(processor.decode(labels[labels != -100]))


def test_loss_is_on_the_answer_and_its_end_only(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = charts(tmp_path, processor)
    batch = Collator(processor, made.form, torch.float32)([made.dataset[position] for position in range(5)])
    assert learned(processor, batch, 1) == " Yes, at all times<end_of_utterance>\n"
    assert not (batch["labels"] == processor.image_token_id).any()


def test_every_assistant_turn_carries_loss_once(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = rows(processor, (source("talk.jsonl", format="messages"), talk(tmp_path)))
    batch = Collator(processor, made.form, torch.float32)([made.dataset[0], made.dataset[1]])
    end = "<end_of_utterance>\n"
    assert learned(processor, batch, 0) == "".join(f" assistant says {turn}{end}" for turn in range(2))
    assert learned(processor, batch, 1) == "".join(f" assistant says {turn}{end}" for turn in range(3))


def test_one_turn_has_the_same_labels_in_both_forms(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = charts(tmp_path, processor, count=1)
    row = made.dataset[0]
    turns = {**row, "messages": [*row["prompt"], *row["completion"]]}
    one = Collator(processor, "prompt_completion", torch.float32)([row])
    other = Collator(processor, "messages", torch.float32)([turns])
    assert torch.equal(one["labels"], other["labels"])
    assert torch.equal(one["input_ids"], other["input_ids"])


def test_pixels_are_cast_and_masks_are_bool(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = charts(tmp_path, processor, count=2)
    batch = Collator(processor, made.form, torch.bfloat16)([made.dataset[0], made.dataset[1]])
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["pixel_attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].dtype == torch.int64


def test_prompts_are_what_stands_before_the_answer(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = charts(tmp_path, processor)
    collator = Collator(processor, made.form, torch.float32)
    examples = [made.dataset[position] for position in range(5)]
    prompts = collator.prompts(examples)
    for position, row in enumerate(examples):
        trained = collator([row])
        before = trained["input_ids"][0][trained["labels"][0] == -100]
        asked = prompts["input_ids"][position][prompts["attention_mask"][position] == 1]
        assert torch.equal(before, asked)
    assert prompts["attention_mask"][:, -1].all()  # padded left
    assert "labels" not in prompts


def test_prompt_of_a_conversation_ends_before_its_last_answer(
    tmp_path: Path, processor: ProcessorMixin
) -> None:
    made = rows(processor, (source("talk.jsonl", format="messages"), talk(tmp_path)))
    asked = Collator(processor, made.form, torch.float32).prompts([made.dataset[0]])
    text = processor.decode(asked["input_ids"][0])
    assert text.endswith("user says 1<end_of_utterance>\nAssistant:")
    assert "assistant says 0" in text


def test_shrunk_images_are_shrunk_in_the_batch(tmp_path: Path, processor: ProcessorMixin) -> None:
    tiled = llava_next(processor)
    made = rows(tiled, (source(), chartqa(tmp_path / "charts", [png(0, 168, 168)])))
    row = made.dataset[0]
    collator = Collator(tiled, made.form, torch.float32)
    assert collator([{**row, "scale": 0.3}])["image_sizes"].tolist() == [[50, 50]]
    assert collator.prompts([{**row, "scale": 0.3}])["image_sizes"].tolist() == [[50, 50]]


def test_workers_make_the_same_batches(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = charts(tmp_path, processor)
    collator = Collator(processor, made.form, torch.float32)
    alone = list(DataLoader(made.dataset, batch_size=2, collate_fn=collator))
    beside = list(DataLoader(made.dataset, batch_size=2, collate_fn=collator, num_workers=2))
    for one, other in zip(alone, beside, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    copied = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copied([made.dataset[0]])["input_ids"], collator([made.dataset[0]])["input_ids"])


def test_an_image_that_went_bad_is_named(tmp_path: Path, processor: ProcessorMixin) -> None:
    file = talk(tmp_path)
    made = rows(processor, (source("talk.jsonl", format="messages"), file))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"talk\.jsonl\[train\] row 1: 0 bytes"):
        Collator(processor, made.form, torch.float32)([made.dataset[1]])


# --- the audit ---


def test_audit_prints_what_carries_loss(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = charts(tmp_path, processor)
    lines = audit(made, Collator(processor, made.form, torch.float32), processor)
    text = "\n".join(lines)
    assert lines[0] == "label audit: 3 of 5 rows"
    assert "charts[train] row 0: " in text
    assert "prompt ends  " in text
    assert "long question?<end_of_utterance>\\nAssistant:'" in text
    assert "loss on      ' 12<end_of_utterance>\\n'" in text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_audit_looks_at_every_row_of_a_few(count: int, tmp_path: Path, processor: ProcessorMixin) -> None:
    made = rows(processor, (source(), chartqa(tmp_path / "charts", [png()] * count)))
    lines = audit(made, Collator(processor, made.form, torch.float32), processor, samples=3)
    assert lines[0] == f"label audit: {count} of {count} rows"


def test_audit_of_conversations_and_of_rows_without_images(tmp_path: Path, processor: ProcessorMixin) -> None:
    made = rows(processor, (source("talk.jsonl", format="messages"), talk(tmp_path, bare=2)))
    collator = Collator(processor, made.form, torch.float32)
    lines = audit(made, collator, processor, samples=4)
    assert sum("loss on" in line for line in lines) == 9  # 2 + 3 + 2 + 2 turns
    assert not any(line.startswith("warning") for line in lines)
    mixed = collator([made.dataset[0], made.dataset[3]])
    assert mixed["image_count"].tolist() == [1, 0]
    # TRL's collator fails on this order, so it is changed; `row_index` tells.
    swapped = collator([made.dataset[3], made.dataset[0]])
    assert swapped["row_index"].tolist() == [0, 3]
    assert torch.equal(swapped["labels"], mixed["labels"])
    assert collator([made.dataset[2]])["image_count"].tolist() == [0]


def test_one_answer_rows_with_and_without_images_mix(tmp_path: Path, processor: ProcessorMixin) -> None:
    (tmp_path / "a.png").write_bytes(png())
    entries = [{"images": names, "prompt": "How many?", "completion": "4"} for names in ([], ["a.png"], [])]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    made = rows(processor, (source("t.jsonl", format="prompt_completion"), file))
    collator = Collator(processor, made.form, torch.float32)
    assert audit(made, collator, processor)
    batch = collator([made.dataset[position] for position in range(3)])
    assert batch["row_index"].tolist() == [0, 1, 2]
    assert batch["image_count"].tolist() == [0, 1, 0]


def test_audit_refuses_a_mix_that_the_processor_cannot_batch(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows(processor, (source("talk.jsonl", format="messages"), talk(tmp_path, bare=1)))
    genuine = Collator.__call__

    def picky(self: Collator, batch: Any) -> Any:
        if len(batch) > 1 and not all(row["image_count"] for row in batch):
            raise ValueError("Invalid input type. Must be a list of images.")
        return genuine(self, batch)

    monkeypatch.setattr(Collator, "__call__", picky)
    with pytest.raises(DataError, match=r"row 2 and .* row 0: the processor cannot make a batch"):
        audit(made, Collator(processor, made.form, torch.float32), processor)


Change = Any


def without_loss(batch: dict[str, Any]) -> None:
    batch["labels"][:] = -100


def everywhere(batch: dict[str, Any]) -> None:
    batch["labels"][:] = batch["input_ids"]


def on_the_question(batch: dict[str, Any]) -> None:
    start = int((batch["labels"][0] != -100).nonzero()[0])
    batch["labels"][0, start - 8 : start] = batch["input_ids"][0, start - 8 : start]


def on_an_image_token(batch: dict[str, Any]) -> None:
    place = int((batch["input_ids"][0] == 4).nonzero()[0])
    batch["labels"][0, place] = 4


def on_something_else(batch: dict[str, Any]) -> None:
    labels = batch["labels"][0]
    labels[(labels != -100).nonzero()[0]] = 99


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_loss, "nothing carries loss"),
        (everywhere, "image tokens carry loss"),
        (on_the_question, "the prompt carries loss"),
        (on_an_image_token, "1 image tokens carry loss"),
        (on_something_else, "labels differ from the tokens"),
    ],
)
def test_audit_refuses_wrong_labels(
    change: Change, reason: str, tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chartqa(tmp_path / "charts", [png()], query=["Why?"], label=[["12"]])
    loaded = rows(processor, (source(), made))
    genuine = Collator.__call__

    def changed(self: Collator, batch: Any) -> Any:
        out = genuine(self, batch)
        change(out)
        return out

    monkeypatch.setattr(Collator, "__call__", changed)
    with pytest.raises(DataError, match=rf"charts\[train\] row 0: .*{reason}"):
        audit(loaded, Collator(processor, loaded.form, torch.float32), processor)


def test_audit_warns_when_the_end_of_a_turn_is_not_learned(tmp_path: Path, processor: ProcessorMixin) -> None:
    careless = copy.copy(processor)
    careless.chat_template = turn_template(processor).replace(
        "<end_of_utterance>\n{% endgeneration %}", "{% endgeneration %}<end_of_utterance>\n"
    )
    made = rows(careless, (source("talk.jsonl", format="messages"), talk(tmp_path)))
    lines = audit(made, Collator(careless, made.form, torch.float32), careless)
    assert lines[-1].startswith("warning: the end of a turn carries no loss")
