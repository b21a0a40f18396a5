"""What an export says and compares, as pure functions: the tables of their docstrings."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from runner.errors import StorageError
from runner.export import room
from runner.export.card import Card, markdown
from runner.export.code import Base, load_lines
from runner.export.likeness import TOLERANCE, Likeness, Step, compared, likeness
from runner.export.order import Made
from runner.export.public import public_job, public_path
from runner.export.source import Trained
from runner.manifest import Job
from runner.supervisor.identity import Identity
from tests.small_job import with_value


def step(token: int, *logits: float, ids: tuple[int, ...] = (1, 2)) -> Step:
    return Step(token=token, ids=ids, logits=logits, scale=10.0)


A, B = step(1, 10.0, 9.0), step(2, 1.0, 8.0)


@pytest.mark.parametrize(
    ("found", "equal", "within", "at"),
    [
        ((A, B), True, True, 0),
        ((A, step(2, 1.5, 8.0)), True, True, 1),
        ((A, step(2, 1.7, 8.0)), True, False, 1),  # the words are the same, the model is not
        ((step(2, 9.5, 9.6), step(1, 0.0, 0.0)), False, True, 0),  # a tie: what follows does not compare
        ((step(2, 8.0, 9.5), B), False, False, 0),
        ((step(7, 10.0, 9.0), B), False, False, 0),  # a token that was not likely at all
        ((A,), False, True, 0),
        ((step(1, math.nan, 9.0), B), True, False, 0),
    ],
)
def test_likeness(found: tuple[Step, ...], equal: bool, within: bool, at: int) -> None:
    verdict = likeness((A, B), found, 0.06)
    assert (verdict.equal, verdict.within, verdict.at) == (equal, within, at)


def test_likenesses_add_up() -> None:
    ones = [Likeness(True, 0.01, 0, True), Likeness(False, 0.03, 1, True), Likeness(True, 0.0, 0, True)]
    found = compared(ones, 0.06)
    assert (found.questions, found.equal, found.ties, found.apart) == (3, 2, 1, 0.03)
    assert sorted(TOLERANCE) == sorted(room.BYTES) == ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("HuggingFaceTB/SmolVLM-Instruct", "HuggingFaceTB/SmolVLM-Instruct"),
        ("demo:charts", "demo:charts"),
        ("data/charts", "data/charts"),
        ("/data/charts", "./charts"),
        ("/data/charts/", "./charts"),
        ("~/charts", "./charts"),
        ("../charts", "./charts"),
        ("file:///data/charts", "./charts"),
        ("/", "./here"),
    ],
)
def test_public_path(path: str, seen: str) -> None:
    assert public_path(path) == seen


def test_a_public_job_trains_the_same_and_tells_no_place() -> None:
    secret = "hf_" + "a" * 24
    given = {
        **with_value("model.name_or_path", "/home/alice/models/base"),
        "datasets": {
            "train": [{"path": "/home/alice/rows.jsonl", "format": "vqa", "image_folder": "/home/alice/i"}]
        },
        "lora": {"r": 4, "init_from": "/home/alice/runs/a/adapter"},
        "training": {"learning_rate": 1e-5, "logging_dir": "/home/alice/logs", "run_name": secret},
        "checkpoints": {"uri": "s3://alices-bucket/runs", "expected_bucket_owner": "123456789012"},
        "aws_batch": {"queue": "alices-queue"},
    }
    job = Job.model_validate(given)
    text = public_job(job, {"HF_TOKEN": secret})
    for private in ("/home", "bucket", "queue", "123456789012", secret):
        assert private not in text
    again = Job.model_validate(yaml.safe_load(text))
    assert again.lora == {"r": 4, "init_from": "./adapter"}
    assert again.training.options["learning_rate"] == 1e-5
    assert again.datasets.train[0].path == "./rows.jsonl"
    assert again.evaluation == job.evaluation


def test_the_metrics_of_several_sources_are_not_laid_at_the_door_of_one(tmp_path: Path) -> None:
    paths = ["org/a", "org/b"]
    evals = [{"path": path, "format": "vqa", "split": f"test{n}"} for n, path in enumerate(paths)]
    found = []
    for asked in (evals, evals[:1]):
        given = with_value("datasets.eval", asked) | {"evaluation": {}}
        job = Job.model_validate(given)
        made = Made(
            quantization=None,
            answer=(),
            input_ids=[],
            compared=None,
            like_run=None,
            metrics={"merged": {"exact_match": {"overall": 0.5, "n": 4}}},
        )
        stored = Identity(job=given, pins={}, fingerprints={}, versions={})
        trained = Trained(tmp_path, False, job, stored, 3, None, None)
        (result,) = ModelCard(markdown(Card("merged", trained, made, "float32", "x", None))).data.eval_results
        found.append((result.dataset_name, result.dataset_split))
    assert found == [("org/a, org/b", None), ("org/a", "test0")]


def test_load_lines_are_python_and_six_at_most() -> None:
    bits = {"load_in_4bit": True, "llm_int8_skip_modules": ["a.b", "lm_head"]}
    adapter = load_lines("adapter", "me/mine", "bfloat16", Base("org/base", "1" * 40), bits)
    assert len(adapter) == 6
    assert adapter[3] == (
        'base = AutoModelForImageTextToText.from_pretrained("org/base", revision="'
        + "1" * 40
        + '", dtype="bfloat16", quantization_config=quantization)'
    )
    plain = load_lines("adapter", 'a "quoted" folder', "float32", Base("/models/base"), None)
    assert len(plain) == 5 and "quantization" not in "\n".join(plain)
    merged = load_lines("merged", "me/mine", "float16", None, None)
    assert len(merged) == 3 and "peft" not in "\n".join(merged)
    demo = load_lines("adapter", "mine", "float32", Base("demo:smolvlm-tiny"), bits)
    assert len(demo) == 6 and demo[2] == "from runner.demo import resolve_model"
    assert 'from_pretrained(resolve_model("demo:smolvlm-tiny"), dtype="float32", quanti' in demo[3]
    for lines in (adapter, plain, merged, demo):
        names = {node.id for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Name)}
        assert {"model", "processor"} <= names


def test_room_is_counted_in_the_dtype_that_is_written(tmp_path: Path) -> None:
    from runner.demo import resolve_model

    base = resolve_model("demo:smolvlm-tiny")
    narrow, wide = (room.of_weights(base, dtype) for dtype in ("bfloat16", "float32"))
    assert wide == 2 * narrow == 4 * 1_586_816
    with pytest.raises(StorageError, match=rf"needs .* TB, and {tmp_path} has .* free; .*remedy: .*--to"):
        room.check_room(tmp_path / "new", 1 << 60)
    room.check_room(tmp_path / "new", 1)
