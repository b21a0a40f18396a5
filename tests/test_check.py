"""Every problem of a job at once, each with a reason and the right key to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.errors import JobError
from runner.job import foreign
from runner.job.check import check, job_schema
from runner.job.ownership import OWNED
from runner.schema.job import of_method
from runner.settings import resolve
from tests.small_job import SMALL, with_value

DATA = Path(__file__).parent / "data"


def problems_of(text: str, tmp_path: Path) -> list[Any]:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(JobError) as caught:
        resolve(str(file), [], {})
    return caught.value.problems


def only(tree: dict[str, Any]) -> Any:
    job, findings = check(tree, {})
    assert job is None and len(findings) == 1, findings
    return findings[0]


def test_six_mistakes_are_six_problems_with_line_and_remedy() -> None:
    file = DATA / "six-mistakes.yaml"
    with pytest.raises(JobError) as caught:
        resolve(str(file), [], {})
    problems = caught.value.problems
    assert [problem.where for problem in problems] == [
        f"{file}:{place}" for place in ("5:3", "9:6", "11:3", "16:7", "18:3", "19:12")
    ]
    assert all(problem.remedy and problem.reason for problem in problems)
    assert "model.dtype" in problems[0].remedy
    assert "write 8" in problems[1].remedy
    assert "line 10" in problems[2].reason
    assert problems[3].path == "datasets.train[0].colour"
    assert "training.learning_rate" in problems[4].remedy
    assert problems[5].path == "training.packing"


@pytest.mark.parametrize(
    ("path", "use"),
    [
        ("model.torch_dtype", "model.dtype"),
        ("torch_dtype", "model.dtype"),
        ("training.cutoff_len", "datasets.max_length"),
        ("sequence_len", "datasets.max_length"),
        ("datasets.max_seq_length", "datasets.max_length"),
        ("micro_batch_size", "training.per_device_train_batch_size"),
        ("training.warmup_ratio", "training.warmup_steps"),
        ("base_model", "model.name_or_path"),
        ("model_name_or_path", "model.name_or_path"),
        ("model.base_model", "model.name_or_path"),
        ("lora_r", "lora.r"),
        ("lora.lora_r", "lora.r"),
        ("lora_rank", "lora.r"),
        ("lora_target", "lora.target_modules"),
        ("load_in_4bit", "quantization.load_in_4bit"),
        ("model.load_in_4bit", "quantization.load_in_4bit"),
        ("quantization_bit", "quantization.load_in_4bit"),
        ("num_epochs", "training.num_train_epochs"),
        ("learning_rate", "training.learning_rate"),
        ("lora_alpha", "lora.lora_alpha"),
        ("output_dir", "name"),
        ("training.logging_dir", "name"),
        ("training.overwrite_output_dir", "name"),
        ("training.group_by_length", "datasets.order"),
        ("training.evaluation_strategy", "training.eval_strategy"),
        ("tokenizer", "model.processor"),
        ("freeze_vision_tower", "model.freeze"),
        ("max_pixels", "model.processor"),
        ("stage", "method"),
        ("finetuning_type", "lora"),
        ("dataset", "datasets.train"),
        ("training.gradient_accumulation_steps", "training.global_batch_size"),
        ("training.gradient_acumulation_steps", "training.global_batch_size"),
        ("training.save_steps", "checkpoints.save_steps"),
        ("checkpoints.save_total_limit", "checkpoints.keep_last"),
        ("training.max_length", "datasets.max_length"),
        ("training.seed", "seed"),
        ("training.bf16", "model.dtype"),
        ("training.deepspeed", "launch.strategy"),
        ("model.name", "model.name_or_path"),
        ("model.processor.use_fast", "model.image_backend"),
    ],
)
def test_foreign_and_owned_names_are_answered(path: str, use: str) -> None:
    finding = only(with_value(path, 1))
    assert f"use {use}" in finding.remedy or finding.remedy.startswith(f"use {use}")


@pytest.mark.parametrize(
    "path", ["training.save_safetensors", "training.push_to_hub", "model.trust_remote_code"]
)
def test_names_without_a_counterpart_are_removed(path: str) -> None:
    assert only(with_value(path, True)).remedy.startswith("remove it")


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("trainnig", ("training",)),
        ("training.learnin_rate", ("training", "learning_rate")),
        ("lora.lora_dropuot", ("lora", "lora_dropout")),
        ("quantization.load_in_4bits", ("quantization", "load_in_4bit")),
        ("checkpoints.keep_lats", ("checkpoints", "keep_last")),
    ],
)
def test_misspelt_keys(path: str, right: tuple[str, ...]) -> None:
    _, findings = check(with_value(path, {}), {})
    assert findings[0].suggestion == right


@pytest.mark.parametrize(
    ("path", "value", "reason", "remedy"),
    [
        ("training.learning_rate", "2e-4", "text", "write 0.0002"),
        ("training.learning_rate", 0, "not above 0", "more than 0"),
        ("training.num_train_epochs", 0, "not above 0", "more than 0"),
        ("training.max_steps", 0, "below 1", "1 or more"),
        ("training.warmup_steps", -1, "below 0", "0 or more"),
        ("training.lr_scheduler_type", "cosin", "not a choice", "did you mean cosine?"),
        ("training.optim", "adamw", "not a choice", "adamw_torch"),
        ("training.eval_strategy", "step", "not a choice", "did you mean steps?"),
        ("training.loss_type", "chunked_nll", "not a choice", "nll"),
        ("training.gradient_checkpointing", "yes", "true or false", "YAML 1.2"),
        ("training.logging_steps", True, "true is true or false", "log every"),
        ("training.label_names", "labels", "a list", "[labels]"),
        ("training.label_names", [1], "text", '"1"'),
        ("lora.r", 0, "below 1", "1 or more"),
        ("lora.r", 8.0, "fraction", "write 8"),
        ("lora.lora_dropout", 1, "not below 1", "less than 1"),
        ("lora.init_lora_weights", "pisa", "not a choice", "did you mean pissa?"),
        ("lora.target_modules", {"a": 1}, "mapping", "list of module names"),
        ("quantization.bnb_4bit_quant_type", "nf5", "not a choice", "did you mean nf4?"),
        ("quantization.bnb_4bit_compute_dtype", "bf16", "not a choice", "bfloat16"),
        ("seed", 10.5, "fraction", "seed"),
        ("seed", None, "null", "default, 42"),
        ("name", 8, "a whole number", 'quotes: "8"'),
        ("datasets.max_length", "1_024", "text", "write 1024"),
    ],
)
def test_types_choices_and_ranges(path: str, value: Any, reason: str, remedy: str) -> None:
    findings = check(with_value(path, value), {})[1]
    finding = next(one for one in findings if one.path[:2] == tuple(path.split(".")))
    assert reason in finding.reason and remedy.lower() in finding.remedy.lower()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.learning_rate", 1),
        ("training.eval_steps", 0.5),
        ("training.max_steps", -1),
        ("training.eval_strategy", "no"),
        ("training.report_to", ["wandb", "tensorboard"]),
        ("training.pad_to_multiple_of", "auto"),
        ("training.neftune_noise_alpha", None),
        ("training.gradient_checkpointing_kwargs", {"use_reentrant": False}),
        (
            "lora",
            {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True},
        ),
        ("lora", {"rank_pattern": {"q_proj": 4}}),
        ("datasets.eval", []),
    ],
)
def test_what_upstream_can_do_passes(path: str, value: Any) -> None:
    job, findings = check(with_value(path, value), {})
    assert findings == [] and job is not None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"format": "vqa", "columns": {"qestion": "query"}}, "not a role"),
        ({"format": "caption", "columns": {"question": "q"}}, "not a role"),
        ({"format": "vqa", "columns": {"query": "question"}}, "not a role"),
        ({"format": "messages", "columns": {"image": "a", "images": "b"}}, "named twice"),
        ({"format": "vqa", "prompt": "Describe."}, "reads its prompt"),
    ],
)
def test_roles(source: dict[str, Any], reason: str) -> None:
    assert reason in only(with_value("datasets.train", [{"path": "a", **source}])).reason


def test_a_bare_yes_is_explained_also_where_text_is_wanted(tmp_path: Path) -> None:
    text = (
        "name: a\nmodel: {name_or_path: x, processor: {do_image_splitting: no}}\n"
        "datasets: {train: [{path: x, format: vqa}]}\n"
        "training: {gradient_checkpointing: on, eval_strategy: no, run_name: off}\nlora: {bias: 'no'}\n"
    )
    problems = problems_of(text, tmp_path)
    assert [problem.path for problem in problems] == [
        "model.processor.do_image_splitting",
        "training.gradient_checkpointing",
        "training.run_name",
        "lora.bias",
    ]
    assert "YAML 1.2" in problems[0].reason and "YAML 1.2" in problems[1].remedy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.name_or_path", "hf_" + "a" * 34),
        ("model.revision", "AKIA" + "A1B2" * 4),
        ("training.run_name", "ghp_" + "b" * 36),
        ("datasets.train", [{"path": "https://user:hunter2@host/x.parquet", "format": "vqa"}]),
        ("model.processor", {"token": "hunter2"}),
        ("training.hub_token", "hunter2"),
        ("model.processor", {"note": "-----BEGIN RSA PRIVATE KEY-----\nhunter2"}),
        ("api_key", "hunter2"),
        ("wandb", {"password": "hunter2"}),
    ],
)
def test_credentials_are_refused_and_never_printed(path: str, value: Any, tmp_path: Path) -> None:
    import json

    problems = problems_of(json.dumps(with_value(path, value)), tmp_path)
    said = str(JobError(problems))
    assert any("credential" in problem.reason for problem in problems)
    for secret in ("hunter2", "a" * 34, "A1B2A1B2", "b" * 36):
        assert secret not in said


def test_words_of_the_field_are_no_credentials() -> None:
    tree = with_value("model.processor", {"image_token": "<image>", "bos_token": "<s>"})
    assert check(tree, {})[1] == []
    assert check(with_value("training.eos_token", "</s>"), {})[1] == []
    assert check(with_value("model.revision", "0123456789abcdef0123456789abcdef01234567"), {})[1] == []


def test_the_method_decides_what_training_may_hold() -> None:
    finding = only(with_value("training.beta", 0.2))
    assert finding.reason == "beta is a key of the other method" and "method" in finding.remedy
    pairs = {**SMALL, "method": "dpo", "datasets": {"train": [{"path": "a", "format": "preference"}]}}
    assert check({**pairs, "training": {"beta": 0.2, "loss_type": ["sigmoid", "sft"]}}, {})[1] == []
    assert check({**pairs, "training": {"loss_type": "ipo"}}, {})[1] == []
    assert only({**pairs, "training": {"eos_token": "x"}}).reason == "eos_token is a key of the other method"
    assert "did you mean sigmoid" in only({**pairs, "training": {"loss_type": "sigmod"}}).remedy


def test_every_answer_names_a_key_of_a_job() -> None:
    schema = of_method(job_schema(), "sft")

    def exists(path: str) -> bool:
        node: dict[str, Any] = schema
        for part in path.replace("[0]", ".0").split("."):
            branches = [node, *node.get("anyOf", ())]
            branches = [
                schema["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in branches
            ]
            found = [
                one["items"] if part == "0" else one["properties"][part]
                for one in branches
                if (part == "0" and "items" in one) or part in one.get("properties", {})
            ]
            if not found:
                return False
            node = found[0]
        return True

    answers = [*foreign.FOREIGN.values(), *foreign.FOREIGN_AT.values(), *foreign.PROCESSOR.values()]
    uses = [one.use for one in answers] + [one.use for table in OWNED.values() for one in table.values()]
    assert [use for use in uses if use and not exists(use)] == []


def test_too_many_problems_stay_fast() -> None:
    tree = {**SMALL, **{f"key_{index}": index for index in range(3000)}}
    assert len(check(tree, {})[1]) == 200
