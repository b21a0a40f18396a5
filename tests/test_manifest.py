"""The models of a job: defaults, strictness, and the crossing into the training process."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from runner import manifest
from runner.job.check import check
from runner.manifest import Job
from tests.small_job import SMALL, with_value


def test_defaults_of_a_small_job() -> None:
    job = Job.model_validate(SMALL)
    assert job.method == "sft" and job.seed == 42
    assert job.model.freeze == ["vision_tower", "projector"] and job.model.dtype == "bfloat16"
    assert job.quantization is None and job.lora is None and job.evaluation is None
    assert job.training.global_batch_size == 8 and job.training.options == {}
    assert job.checkpoints.max_loss_seconds == 120.0


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("2m", 120.0), ("1.5h", 5400.0)])
def test_durations(text: str, seconds: float) -> None:
    assert (
        Job.model_validate(with_value("checkpoints.max_loss", text)).checkpoints.max_loss_seconds == seconds
    )


def test_a_job_crosses_as_json() -> None:
    job = Job.model_validate(with_value("training.learning_rate", 2e-4))
    again = Job.model_validate(job.model_dump(mode="json"))
    assert again == job
    assert again.training.options == {"learning_rate": 2e-4}


def test_a_whole_threshold_is_the_float_that_upstream_wants() -> None:
    from transformers import BitsAndBytesConfig

    given = {"load_in_8bit": True, "llm_int8_threshold": 6}
    quantization = Job.model_validate(with_value("quantization", given)).quantization
    assert quantization is not None and BitsAndBytesConfig(**quantization).llm_int8_threshold == 6.0
    with pytest.raises(TypeError):
        BitsAndBytesConfig(**given)


def test_every_field_is_documented() -> None:
    models = [one for one in vars(manifest).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    ours = [one for one in models if one.__module__ == manifest.__name__ and one.model_fields]
    assert len(ours) >= 8
    sections = ("model", "datasets", "training", "launch", "checkpoints")  # described by their own docstrings
    missing = [
        f"{one.__name__}.{name}"
        for one in ours
        for name, field in one.model_fields.items()
        if not field.description and name not in sections
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", True),
        ("seed", "8"),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("name", "Upper"),
        ("name", "a" * 46),
        ("name", "-a"),
        ("name", ""),
        ("name", 5),
        ("nmae", "x"),
        ("method", "ppo"),
        ("model", None),
        ("model", []),
        ("model.name_or_path", ""),
        ("model.dtype", "bf16"),
        ("model.freeze", ["head"]),
        ("model.processor", None),
        ("datasets.train", []),
        ("datasets.train", [{"path": "a"}]),
        ("datasets.train", [{"path": "a", "format": "vqa", "split": "train["}]),
        ("datasets.train", [{"path": "a", "format": "vqa", "columns": {"question": 1}}]),
        ("datasets.train", [{"path": "a", "format": "vqa", "data_files": [""]}]),
        ("datasets.max_length", 0),
        ("training.global_batch_size", 0),
        ("training.global_batch_size", None),
        ("training.per_device_train_batch_size", "Auto"),
        ("training.per_device_train_batch_size", 0),
        ("launch.nodes", 0),
        ("launch.gpus_per_node", 0),
        ("launch.gpus_per_node", "all"),
        ("launch.strategy", "fsdp"),
        ("checkpoints.keep_last", 1),
        ("checkpoints.max_loss", "0m"),
        ("checkpoints.max_loss", "2 minutes"),
        ("checkpoints.uri", "s3://a"),
        ("lora", []),
        ("quantization", "4bit"),
        ("evaluation", True),
    ],
)
def test_pydantic_and_the_schema_refuse_the_same(path: str, value: Any) -> None:
    tree = with_value(path, value)
    with pytest.raises(ValidationError):
        Job.model_validate(tree)
    job, findings = check(tree, {})
    assert job is None and findings


def test_a_job_cannot_be_changed() -> None:
    job = Job.model_validate(SMALL)
    with pytest.raises(ValidationError):
        job.seed = 1  # type: ignore[misc]
