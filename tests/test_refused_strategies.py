"""What a strategy does not do: refused before it begins, and upstream failing at the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from runner.errors import DataError
from runner.job.check import check
from runner.plan import Strategy
from runner.train.data.rows import Rows
from runner.train.placement import check_rows
from tests.attempts import charts, planned, run_ranks, steps
from tests.small_job import SMALL

ONE_STEP = {"checkpoints": {"save_steps": 1}, "training": {"global_batch_size": 2, "max_steps": 1}}


def attempt(
    folder: Path, strategy: Strategy, changes: dict[str, Any], **fields: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    training = {**ONE_STEP["training"], **changes.get("training", {})}
    whole = {**ONE_STEP, **changes, "training": training}
    outcome, events = run_ranks(folder, whole, strategy, 1 if strategy == "single" else 2, **fields)
    return outcome, steps(events)


@pytest.mark.parametrize(
    ("strategy", "changes", "error"),
    [
        ("zero2", {"training": {"optim": "adamw_bnb_8bit"}}, "not found in optimizer state fragment"),
        ("fsdp2", {"training": {"optim": "adafactor"}}, "DTensor"),
        ("fsdp2", {"training": {"optim": "lion_32bit"}}, "does not have a sharding strategy"),
        ("fsdp2", {"quantization": {"load_in_8bit": True}}, "has no attribute 'CB'"),
        (
            "fsdp2",
            {
                "model": {"dtype": "bfloat16"},
                "quantization": {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
            },
            "is invalid for input of size",
        ),
        ("zero3", {"quantization": {"load_in_8bit": True}, "lora": {"use_dora": True}}, "ds_status"),
    ],
)
def test_upstream_fails_at_what_the_matrix_refuses(
    tmp_path: Path, strategy: Strategy, changes: dict[str, Any], error: str
) -> None:
    outcome, _ = attempt(tmp_path, strategy, changes)
    assert outcome["outcome"] == "failed" and error in outcome["error"], outcome
    model = {**SMALL["model"], **changes.get("model", {})}
    job, findings = check(
        {**SMALL, "lora": {}, **changes, "model": model, "launch": {"strategy": strategy}}, {}
    )
    assert job is None and len(findings) == 1


def test_float16_overflows_under_deepspeed(tmp_path: Path) -> None:
    """Without a sound: the norm is no number, and the step does nothing good."""
    outcome, (step,) = attempt(tmp_path, "zero2", {"model": {"dtype": "float16"}})
    assert outcome["outcome"] == "done" and step["grad_norm"] is None


def test_a_head_that_trains_has_another_gradient_under_fsdp2(tmp_path: Path) -> None:
    """Fails when it is averaged, and the rows of `matrix_strategies` about it can go. TRL (1.16) multiplies
    the gathered weight itself (huggingface/trl pull request 6077), and PyTorch takes the gradient of what it
    gathered for one that is already the same everywhere."""
    changes = {"lora": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}}
    (norm,), (of_fsdp2,), (of_zero3,) = (
        [step["grad_norm"] for step in attempt(tmp_path / name, name, changes)[1]]
        for name in ("single", "fsdp2", "zero3")
    )
    assert of_zero3 == pytest.approx(norm, rel=1e-3)
    assert abs(of_fsdp2 - norm) > 0.1 * norm


def rows(*image_counts: int) -> Rows:
    columns = {"row": [f"row {n}" for n in range(len(image_counts))], "image_count": list(image_counts)}
    return Rows(Dataset.from_dict(columns), "messages", (), (), 10, "0")


ALL, MIXED, NONE = (1, 2), (1, 0, 2), (0, 0)


@pytest.mark.parametrize(
    ("strategy", "freeze", "train", "evaluation", "refused"),
    [
        ("zero3", ["vision_tower", "projector"], MIXED, ALL, "train"),
        ("fsdp2", ["vision_tower", "projector"], MIXED, ALL, "train"),
        ("fsdp2", ["vision_tower", "projector"], ALL, MIXED, "eval"),
        ("ddp", [], MIXED, ALL, "train"),
        ("zero1", ["vision_tower"], MIXED, ALL, "train"),
        ("zero2", ["projector"], MIXED, ALL, "train"),
        ("ddp", [], NONE, ALL, "train"),
        ("ddp", [], ALL, MIXED, None),
        ("ddp", ["vision_tower", "projector"], MIXED, MIXED, None),
        ("zero2", ["vision_tower", "projector"], MIXED, MIXED, None),
        ("single", [], MIXED, MIXED, None),
        ("fsdp2", [], ALL, ALL, None),
        ("zero3", [], NONE, NONE, None),
    ],
)
def test_text_among_rows_with_images(
    tmp_path: Path,
    strategy: Strategy,
    freeze: list[str],
    train: tuple[int, ...],
    evaluation: tuple[int, ...],
    refused: str | None,
) -> None:
    plan = planned(tmp_path, {"model": {"freeze": freeze}}, strategy=strategy)
    if refused is None:
        check_rows(plan, rows(*train), rows(*evaluation))
        return
    with pytest.raises(DataError, match=rf"datasets\.{refused}: row [01] has no image.*Remedy: "):
        check_rows(plan, rows(*train), rows(*evaluation))


def test_a_run_that_mixes_them_says_so_before_it_trains(tmp_path: Path) -> None:
    """Each rank has one row of the step, so that one of them would wait for the other's tower."""
    table = Dataset.from_parquet(str(next(charts().glob("data/train*")))).select(range(2))
    picture = tmp_path / "a.png"
    table[0]["image"].save(picture)
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    file = tmp_path / "talk.jsonl"
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    with_image = [{"role": "user", "content": content}, said[1]]
    lines = [
        {"images": ["a.png"], "messages": with_image},
        {"images": [], "messages": said},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(file), "format": "messages"}
    outcome, _ = attempt(tmp_path / "run", "fsdp2", {"datasets": {"train": [source]}}, data=file)
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 65), outcome
    assert "row 1 has no image" in outcome["error"] and "fsdp2" in outcome["error"]
