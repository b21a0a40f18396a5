"""Which savings are in force: a table of jobs, and what a plan says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

from runner.demo import resolve_model
from runner.manifest import Job
from runner.train.data.once import Once
from runner.train.data.rows import Form, Rows
from runner.train.savings import savings
from tests.attempts import JOB, merged
from tests.test_dpo import DPO

ON = (None, None, None)
NO_REFERENCE = "method sft has no reference"


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    made: ProcessorMixin = AutoProcessor.from_pretrained(resolve_model("demo:smolvlm-tiny"), backend="pil")
    return made


def rows(form: Form, longest: int = 50) -> Rows:
    return Rows(Dataset.from_dict({}), form, (), (), longest, "")


CASES: list[tuple[dict[str, Any], Form, tuple[str | None, str | None, str | None]]] = [
    (DPO, "preference", ON),
    ({}, "prompt_completion", (None, None, NO_REFERENCE)),
    ({"speed": {"encode_once": False}}, "prompt_completion", ("says no", None, NO_REFERENCE)),
    ({"speed": {"share_prompt": False}}, "prompt_completion", (None, "says no", NO_REFERENCE)),
    (merged(DPO, {"speed": {"cache_reference": False}}), "preference", (None, None, "says no")),
    ({}, "messages", ("several answers", "several answers", NO_REFERENCE)),
    # Rows that share a sequence share what is drawn for it; TRL's dpo draws nothing unless asked to.
    ({"lora": {"lora_dropout": 0.1}}, "prompt_completion", (None, "lora_dropout 0.1", NO_REFERENCE)),
    (merged(DPO, {"lora": {"lora_dropout": 0.1}}), "preference", ON),
    (
        merged(DPO, {"lora": {"lora_dropout": 0.1}, "training": {"disable_dropout": False}}),
        "preference",
        (None, "lora_dropout 0.1", "disable_dropout"),
    ),
    ({"training": {"neftune_noise_alpha": 5}}, "prompt_completion", (None, "neftune", NO_REFERENCE)),
    (
        merged(DPO, {"training": {"neftune_noise_alpha": 5}}),
        "preference",
        (None, "neftune", "neftune_noise_alpha makes the reference another one"),
    ),
    (
        {"lora": {"lora_dropout": 0.1}, "model": {"freeze": ["projector"]}},
        "prompt_completion",
        ("lora_dropout 0.1", "lora_dropout 0.1", NO_REFERENCE),
    ),
    ({"model": {"attn_implementation": "eager"}}, "prompt_completion", (None, None, NO_REFERENCE)),
    (
        {"model": {"attn_implementation": "flash_attention_2"}},
        "prompt_completion",
        (None, "takes no mask", NO_REFERENCE),
    ),
]


@pytest.mark.parametrize(("changes", "form", "expected"), CASES)
def test_what_is_in_force(
    processor: ProcessorMixin, changes: dict[str, Any], form: Form, expected: tuple[str | None, ...]
) -> None:
    job = Job.model_validate(merged(JOB, changes))
    told = savings(job, rows(form), processor, str(resolve_model("demo:smolvlm-tiny"))).told()
    assert [*told] == ["encode_once", "share_prompt", "cache_reference"]
    for said, part in zip(told.values(), expected, strict=True):
        assert said is None if part is None else part in (said or ""), told


@pytest.mark.parametrize(("longest", "in_force"), [(4096, True), (4097, False)])
def test_a_window_of_attention_that_no_row_outgrows_is_none(
    tmp_path: Path, processor: ProcessorMixin, longest: int, in_force: bool
) -> None:
    AutoConfig.for_model("idefics2").save_pretrained(tmp_path)  # Mistral, 4096
    job = Job.model_validate(merged(JOB, DPO))
    found = savings(job, rows("preference", longest), processor, str(tmp_path))
    assert (found.share_prompt is None) == in_force and found.encode_once is None


def test_processors_that_cannot_be_told_share_pairs_only(processor: ProcessorMixin) -> None:
    from transformers import Idefics2Processor

    other = object.__new__(Idefics2Processor)
    folder = str(resolve_model("demo:smolvlm-tiny"))
    questions = savings(Job.model_validate(JOB), rows("prompt_completion"), other, folder)
    assert "Idefics2Processor cannot be told" in (questions.encode_once or "")
    pairs = savings(Job.model_validate(merged(JOB, DPO)), rows("preference"), other, folder)
    assert pairs.told() == dict.fromkeys(pairs.told())


def test_the_shared_processor_is_the_same_but_for_what_it_adds(processor: ProcessorMixin) -> None:
    import pickle

    from runner.train.data.once import once

    made = once(processor)
    assert isinstance(made, type(processor)) and isinstance(made, Once)
    assert made.tokenizer is processor.tokenizer and made.chat_template == processor.chat_template
    again = pickle.loads(pickle.dumps(made))  # to the loader's workers
    assert isinstance(again, Once) and again.chat_template == processor.chat_template
