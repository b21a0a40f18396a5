"""Work that rows have in common, done once: the numbers of every architecture, and what is laid out where."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as Pillow
from transformers import AutoConfig

from runner.train.data.collator import Collator, Form
from runner.train.data.sharing import Branches, Sharing, found, image_sets
from runner.train.models import model as models
from runner.train.models.architectures import ARCHITECTURES, FREEZABLE
from runner.train.models.packing import pack
from runner.train.models.shared import packs
from tests import shares
from tests.attempts import charts, run, steps
from tests.test_architectures import INSTALLED, MISSING, TORCHVISION, both_ways
from tests.tiny_models import MAKERS, NEED_TORCHVISION

CLOSE = 1e-5
"""Of log-probabilities, and of gradients relative to the largest of a parameter; float32."""

CASES = ("pair", "questions")
NO_SETS = {"idefics2", "internvl"}
"""Processors that cannot be told that rows show the same images; pairs they can."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for every architecture."""
    folder = tmp_path_factory.mktemp("shares")
    both_ways("tests.shares", folder, {name: name in NEED_TORCHVISION for name in MAKERS})
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_shared_work_gives_the_numbers_of_the_rows_one_by_one(compared: Path, name: str) -> None:
    if name in NEED_TORCHVISION and not (INSTALLED or TORCHVISION.is_dir()):
        pytest.skip(MISSING)
    answers: dict[str, dict[str, Any]] = json.loads((compared / f"{name}.json").read_text())
    can_pack = name == "pixtral" or ARCHITECTURES[name].positions is not None
    ways = ("once", "sequences") if can_pack else ("once",)
    assert set(answers) == {
        f"{case} {way} {tower}" for case in CASES for way in ways for tower in ("frozen", "open")
    }
    for case, answer in answers.items():
        for what in ("log_probs", "reference", "mean_logits", "gradients"):
            assert answer[what] <= CLOSE, (case, what, answer)
        assert answer["same"], (case, answer)
        shares = "pair" in case or name not in NO_SETS
        sets = {"pair": 2, "questions": 3}[case.split()[0]]
        assert answer["sets"] == (sets if shares else None)
        if "sequences" in case and shares:
            assert answer["sequences"] == ([2, 2] if "pair" in case else [3, 2, 1])
        # Of one batch: a frozen tower runs for the reference and the policy together.
        assert answer["runs"] == ([1, 1] if "frozen" in case else [2, 2])


# --- what is shared ---


def test_image_sets_are_numbered_by_their_first_rows() -> None:
    assert image_sets(["b", "a", "b", None, "a", None]) == [0, 1, 0, 2, 1, 3]


IMAGE = 9


@pytest.mark.parametrize(
    ("rows", "answers", "prefix"),
    [
        ([[9, 1, 2, 3], [9, 1, 2, 4]], [3, 3], 3),  # up to the first token with loss
        ([[9, 1, 2, 3], [9, 1, 4, 3]], [3, 3], 2),  # up to where they differ
        ([[9, 1, 2, 3], [9, 1, 2, 3, 4]], [3, 2], 2),  # up to the first loss of any
        ([[9, 1, 2], [9, 1, 2, 5]], [2, 2], 2),  # a token of its own is left to every row
        ([[9, 1, 9, 3], [9, 1, 4, 9]], [3, 2], 0),  # an image behind it
        ([[1, 9, 2, 3], [4, 9, 2, 3]], [3, 3], 0),  # nothing in common
        ([[9, 1, 2, 3], [9, 4, 2, 3]], [3, 3], 0),  # an image alone: not worth it
        ([[9, 1, 2, 3], [9, 1, 2, 4]], [None, None], 0),  # no loss anywhere
    ],
)
def test_prefix_of_rows(rows: list[list[int]], answers: list[int | None], prefix: int) -> None:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attended = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    loss = torch.tensor(
        [
            [at is not None and at <= n < len(row) for n in range(width)]
            for row, at in zip(rows, answers, strict=True)
        ]
    )
    sharing = found([0, 0], [1], ids, attended, loss, IMAGE, prefixes=True)
    expected = (Branches((0, 1), prefix),) if prefix else (Branches((0,), 0), Branches((1,), 0))
    assert sharing.sequences == expected and sharing.packs == bool(prefix)
    assert not found([0, 0], [1], ids, attended, loss, IMAGE, prefixes=False).packs


def test_rows_do_not_run_as_one_where_that_is_more_tokens() -> None:
    """Three long answers behind a short prefix are 19 tokens, and a row of its own is padded to them."""
    long = [[9, 1, number, *range(10, 14)] for number in (2, 3, 4)]
    ids, loss = torch.tensor([*long, [9, 5, 6, 7, 8, 0, 0]]), torch.zeros(4, 7, dtype=torch.bool)
    attended = (ids != 0).long()
    loss[:, 3:] = True
    alone = found([0, 0, 0, 1], [1, 1], ids, attended, loss, IMAGE, prefixes=True)
    assert not alone.packs and [one.rows for one in alone.sequences] == [(0,), (1,), (2,), (3,)]
    together = found([0, 0, 0], [1], ids[:3], attended[:3], loss[:3], IMAGE, prefixes=True)
    assert together.sequences == (Branches((0, 1, 2), 2),)


def test_rows_are_laid_out_as_sequences() -> None:
    """`a b c | d e` and `a b c | f`, and a row of its own between them."""
    rows = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 0, 0, 0], [10, 11, 12, 15, 0]])
    sharing = Sharing((0, 1, 0), (1, 1), (5, 2, 4), (Branches((0, 2), 3), Branches((1,), 0)))
    packed = pack(sharing, 5, rows.device)
    assert packed.gather(rows)[0].tolist() == [10, 11, 12, 13, 14, 12, 15]
    assert packed.gather(rows)[1, :2].tolist() == [20, 21]
    assert (packed.source % 5)[0].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert packed.branch[0].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert packed.real.tolist() == [[True] * 7, [True, True] + [False] * 5]
    back = packed.scatter(packed.gather(rows))
    assert [back[0].tolist(), back[1, :2].tolist(), back[2, :4].tolist()] == [
        [10, 11, 12, 13, 14],
        [20, 21],
        [10, 11, 12, 15],
    ]
    sees = packed.visible()[:, 0].int().tolist()
    assert sees[0] == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    assert sees[1][1] == [1, 1, 0, 0, 0, 0, 0]
    assert sees[1][4] == [0, 0, 0, 0, 1, 0, 0]  # padding sees itself, or softmax has nothing


@pytest.mark.parametrize(
    ("name", "attention", "longest", "reason"),
    [
        ("smolvlm", "sdpa", 9000, None),
        ("qwen2_vl", "eager", 9000, None),
        ("smolvlm", "flash_attention_2", 10, "takes no mask"),
        ("gemma3", "sdpa", 10, "both directions"),
        ("paligemma", "eager", 10, "both directions"),
        ("idefics2", "sdpa", 4096, None),  # Mistral's window
        ("idefics2", "sdpa", 4097, "attends to 4096 tokens, and the longest row has 4097"),
    ],
)
def test_models_whose_rows_run_as_one(name: str, attention: str, longest: int, reason: str | None) -> None:
    said = packs(AutoConfig.for_model(name), attention, longest)
    assert said is None if reason is None else reason in (said or "")


# --- in a run ---


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions about each of four charts."""
    file = tmp_path_factory.mktemp("questions") / "questions.parquet"
    charts_ = load_dataset("parquet", data_files=str(next(charts().glob("data/train*"))), split="train[:4]")
    charts_ = charts_.cast_column("image", Image(decode=False))
    rows = [
        {"image": row["image"], "query": row["query"] + more, "label": row["label"]}
        for row in charts_
        for more in ("", " Say it.", " And how many?")
    ]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(file)
    return file


def job(**speed: bool) -> dict[str, Any]:
    source = {
        "path": "questions.parquet",
        "split": "train",
        "format": "vqa",
        "columns": {"question": "query", "answer": "label"},
    }
    return {
        "datasets": {"train": [source], "order": "by_image"},
        "training": {"global_batch_size": 6, "per_device_train_batch_size": 3, "num_train_epochs": 2},
        "speed": speed,
        "checkpoints": {"save_steps": 1},
    }


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_that_shares_has_the_losses_of_one_that_does_not_and_resumes_byte_identically(
    tmp_path: Path, questions: Path
) -> None:
    apart, told = run(tmp_path / "apart", job(encode_once=False, share_prompt=False), data=questions)
    expected = [(step["ids"], step["loss"]) for step in steps(told)]
    assert apart["facts"]["speed"]["share_prompt"] == "speed says no"
    for name, speed in (("once", {"share_prompt": False}), ("all", {})):
        outcome, told = run(tmp_path / name, job(**speed), data=questions)
        assert outcome["facts"]["speed"]["encode_once"] is None
        assert [step["ids"] for step in steps(told)] == [ids for ids, _ in expected]
        assert [step["loss"] for step in steps(told)] == pytest.approx(
            [loss for _, loss in expected], abs=1e-5
        )
    (saved,) = (tmp_path / "all" / "outbox").glob("00000003-*")
    run(tmp_path / "again", job(), data=questions, attempt=2, restore=saved)
    assert adapter(tmp_path / "again") == adapter(tmp_path / "all")


# --- rows that are unlike each other ---


def picture(number: int) -> dict[str, Any]:
    """An image of a shape of its own, as `datasets` stores it."""
    draw = np.random.default_rng(number)
    high, wide = [(40, 40), (30, 60), (60, 30)][number]
    data = io.BytesIO()
    Pillow.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def row(shown: list[int], prompt: list[str | None], **answers: str) -> dict[str, Any]:
    """A prepared row; None in a prompt is where an image stands."""
    said = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in prompt]
    spoken = {name: [{"role": "assistant", "content": [text(told)]}] for name, told in answers.items()}
    return {
        "images": [picture(number) for number in shown],
        "prompt": [{"role": "user", "content": said}],
        **spoken,
        "row": f"{shown} {prompt}",
        "index": 0,
        "image_count": len(shown),
        "pictures": str(shown),
        "scale": 1.0,
    }


def text(told: str) -> dict[str, str]:
    return {"type": "text", "text": told}


LONG = "Look at the first picture and then at the second one, before you say which one, why and when"

UNLIKE: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    "questions": (
        [
            row([0, 1], [None, f"{LONG} and", None, "Which?"], completion="one"),
            row([], ["Only text"], completion="yes it is"),
            row([0, 1], [None, f"{LONG} and", None, "Why?"], completion="so"),
            row([0, 1], [None, f"{LONG} and", None, "When?"], completion="now"),
            row([0], ["Behind the text", None], completion="six"),
            row([0], [None, "How few?"], completion="one more"),
        ],
        [3, 1, 1, 1],  # of two rows about one image, one has it elsewhere
    ),
    "pair": (
        [
            row([0], [None, "How many?"], chosen="one", rejected="one or two"),
            row([], ["Only text"], chosen="yes", rejected="no, no, no"),
            row([1, 0], [None, "and", None, "Which?"], chosen="the same", rejected="the same"),
            row([2], ["Behind the text", None], chosen="a b c d", rejected="e"),
        ],
        [2, 2, 2, 2],
    ),
    "text pair": (
        [
            row([], ["Only text"], chosen="yes", rejected="no, no, no"),
            row([], ["Another one"], chosen="yes", rejected="no"),
        ],
        [2, 2],
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
@pytest.mark.parametrize("window", [None, 16])
def test_rows_with_several_images_and_none(tmp_path: Path, case: str, window: int | None) -> None:
    """And rows of which an evaluation has longer ones than the attention of the text model reaches."""
    name = "idefics3" if window is None else "idefics2"
    folder = shares.save(name, tmp_path / "model")
    if window is not None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["sliding_window"] = window
        (folder / "config.json").write_text(json.dumps(config))
    rows, sequences = UNLIKE[case]
    it = shares.job("unlike", case.split()[-1], list(FREEZABLE), "sdpa")
    processor = models.load_processor(it, str(folder))
    form: Form = "prompt_completion" if case == "questions" else "preference"
    batches = [
        Collator(processor, form, torch.float32, images_once=together, prefixes=together)(rows)
        for together in (False, True)
    ]
    if case == "questions" and window is not None:
        assert "sharing" not in batches[1]  # Idefics2's processor cannot be told
        return
    assert [len(one.rows) for one in batches[1]["sharing"].sequences] == sequences
    scored = shares.Scored(it, folder)
    apart = shares.apart(*(scored(batch) for batch in batches))
    assert all(apart[what] <= CLOSE for what in ("log_probs", "reference", "mean_logits", "gradients")), apart
    assert apart["same"]
