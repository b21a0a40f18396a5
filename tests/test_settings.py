"""Every source of a job: who wins, what is misspelt, what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from runner.errors import AccessDenied, JobError, UsageError
from runner.job.resolved import resolved_yaml
from runner.job.yaml_source import MAX_CHARACTERS
from runner.settings import resolve

DATA = Path(__file__).parent / "data"
GOOD = str(DATA / "good.yaml")

TEXT = """\
name: from-file
seed: 1
model: {name_or_path: "demo:smolvlm-tiny"}
lora: {r: 4, target_modules: [q_proj, v_proj]}
datasets:
  train:
    - {path: one, format: vqa}
    - {path: two, format: vqa, split: test}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(TEXT)
    return str(file)


def refused(job_file: str | None, *overrides: str, **environ: str) -> list[Any]:
    with pytest.raises(JobError) as caught:
        resolve(job_file, list(overrides), environ)
    return caught.value.problems


def test_command_line_over_environment_over_file_over_default(job_file: str) -> None:
    environ = {"JOB__SEED": "2", "JOB__LORA__R": "8"}
    resolved = resolve(job_file, ["seed=3"], environ)
    assert resolved.job.seed == 3
    assert resolved.job.lora == {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    assert resolved.job.name == "from-file" and resolved.job.method == "sft"
    assert resolved.file == job_file
    assert resolved.sources["seed"] == "command line"
    assert resolved.sources["lora.r"] == "environment JOB__LORA__R"
    assert resolved.sources["name"] == f"{job_file}:1"
    assert resolved.sources["datasets.train[1].split"] == f"{job_file}:8"
    assert resolved.sources["method"] == "default"
    assert resolve(job_file, [], environ).job.seed == 2
    assert resolve(job_file, [], {}).job.seed == 1


def test_argument_over_job_file_over_job_yaml(job_file: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(TEXT.replace("from-file", "other"))
    inline = TEXT.replace("from-file", "inline")
    assert resolve(str(other), [], {"JOB_FILE": job_file, "JOB_YAML": inline}).job.name == "other"
    assert resolve(None, [], {"JOB_FILE": job_file, "JOB_YAML": inline}).job.name == "from-file"
    resolved = resolve(None, [], {"JOB_YAML": inline})
    assert resolved.job.name == "inline" and resolved.file == "JOB_YAML"
    assert resolved.sources["name"] == "JOB_YAML:1"
    assert resolve(None, [], {"JOB_FILE": "", "JOB_YAML": inline}).job.name == "inline"


def test_a_file_url(job_file: str) -> None:
    assert resolve(None, [], {"JOB_FILE": f"file://{job_file}"}).job.name == "from-file"
    assert resolve(f"file:{job_file}", [], {}).job.name == "from-file"


def test_no_file_at_all() -> None:
    overrides = ["name=cli", "model.name_or_path=x", "datasets.train=[{path: a, format: vqa}]"]
    resolved = resolve(None, overrides, {})
    assert resolved.job.name == "cli" and resolved.file is None
    environ = {
        "JOB__NAME": "env",
        "JOB__MODEL__NAME_OR_PATH": "x",
        "JOB__DATASETS__TRAIN__0__PATH": "a",
        "JOB__DATASETS__TRAIN__0__FORMAT": "vqa",
    }
    assert resolve(None, [], environ).job.datasets.train[0].path == "a"
    assert "no job was given" in refused(None)[0].reason


def test_an_index_changes_one_item_and_a_list_replaces_all(job_file: str) -> None:
    job = resolve(job_file, ["datasets.train.0.split=train[:5]", "datasets.train[1].max_samples=9"], {}).job
    assert [one.path for one in job.datasets.train] == ["one", "two"]
    assert job.datasets.train[0].split == "train[:5]" and job.datasets.train[1].max_samples == 9
    assert resolve(job_file, ["lora.target_modules=[k_proj]"], {}).job.lora["target_modules"] == ["k_proj"]  # type: ignore[index]
    job = resolve(
        job_file,
        ["datasets.train.2={path: three, format: caption}"],
        {"JOB__DATASETS__TRAIN__0__PATH": "zero"},
    ).job
    assert [one.path for one in job.datasets.train] == ["zero", "two", "three"]
    assert "index 5" in refused(job_file, "datasets.train.5.path=x")[0].reason
    assert "mapping" in refused(job_file, "lora.0=x")[0].reason


def test_an_index_on_the_command_line_changes_a_list_of_the_environment(job_file: str) -> None:
    environ = {"JOB__DATASETS__TRAIN": "[{path: env, format: vqa}]"}
    resolved = resolve(job_file, ["datasets.train.0.split=val"], environ)
    assert [(one.path, one.split) for one in resolved.job.datasets.train] == [("env", "val")]
    assert resolved.sources["datasets.train[0].path"] == "environment JOB__DATASETS__TRAIN"
    assert resolved.sources["datasets.train[0].split"] == "command line"
    file_of_two = resolve(job_file, ["datasets.train=[{path: a, format: vqa}, {path: b, format: vqa}]"], {})
    assert file_of_two.sources["datasets.train[1].split"] == "default", "the file's list is replaced"
    problem = refused(job_file, JOB__DATASETS__TRAIN="[{path: env}]")[0]
    assert problem.where == "environment JOB__DATASETS__TRAIN" and problem.path == "datasets.train[0].format"


def test_an_alias_is_where_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        TEXT.replace("{r: 4,", "&lora {r: 4,") + "training:\n  gradient_checkpointing_kwargs: *lora\n"
    )
    resolved = resolve(str(file), [], {})
    assert resolved.sources["training.gradient_checkpointing_kwargs.r"] == f"{file}:10"


def test_null_removes_a_section_and_the_last_override_wins(job_file: str) -> None:
    assert resolve(job_file, ["lora=null"], {}).job.lora is None
    assert resolve(job_file, [], {"JOB__LORA": "null"}).job.lora is None
    assert resolve(job_file, ["seed=5", "seed=6"], {}).job.seed == 6
    assert resolve(job_file, ["lora={r: 2}", "lora.lora_alpha=4"], {}).job.lora == {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
    }


@pytest.mark.parametrize("text", ["2e-4", "0.0002", "2E-4"])
def test_numbers_are_numbers_in_every_source(text: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"{TEXT}training: {{learning_rate: {text}}}\n")
    assert resolve(str(file), [], {}).job.training.options == {"learning_rate": 2e-4}
    file.write_text(TEXT)
    assert (
        resolve(str(file), [f"training.learning_rate={text}"], {}).job.training.options["learning_rate"]
        == 2e-4
    )
    environ = {"JOB__TRAINING__LEARNING_RATE": text}
    assert resolve(str(file), [], environ).job.training.options["learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("JOB__TRAINNIG__LEARNING_RATE", "JOB__TRAINING__LEARNING_RATE"),
        ("JOB__LORA__RR", "JOB__LORA__R"),
        ("JOB__TRAINING__LEARNING_RAT", "JOB__TRAINING__LEARNING_RATE"),
        ("JOB__DATASETS__TRAIN__0__SPLITT", "JOB__DATASETS__TRAIN__0__SPLIT"),
        ("JOB__LEARNING_RATE", "training.learning_rate"),
        ("JOB__FILE", "JOB_FILE"),
        ("JOB_YML", "JOB_YAML"),
        ("JOBFILE", "JOB_FILE"),
        ("JOB_FIEL", "JOB_FILE"),
        ("JOB_FILES", "JOB_FILE"),
        ("job__lora__r", "JOB__LORA__R"),
        ("JOB_LORA__R", "JOB__LORA__R"),
        ("JOB_LORA_R", "JOB__LORA__R"),
        ("JOB_TRAINING_LEARNING_RATE", "JOB__TRAINING__LEARNING_RATE"),
        ("JOBS__LORA__R", "JOB__LORA__R"),
        ("JOB__LORA____R", "JOB__LORA__R"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_name(name: str, right: str, job_file: str) -> None:
    problems = refused(job_file, **{name: "1"})
    assert any(problem.where == f"environment {name}" and right in problem.remedy for problem in problems)


@pytest.mark.parametrize(
    "name",
    [
        "JOB_NAME",
        "JOB_ID",
        "JOB_TYPE",
        "JOB_TITLE",
        "JOB_MODEL",
        "JOB_COMPLETION_INDEX",
        "JOBS",
        "AWS_BATCH_JOB_ID",
    ],
)
def test_variables_of_others_are_left_alone(name: str, job_file: str) -> None:
    assert resolve(job_file, [], {name: "x", "PATH": "/bin"}).job.name == "from-file"


def test_each_variable_under_a_misspelt_section_is_named(job_file: str) -> None:
    problems = refused(job_file, JOB__LORAA__R="1", JOB__LORAA__LORA_ALPHA="2")
    assert [problem.where for problem in problems] == [
        "environment JOB__LORAA__LORA_ALPHA",
        "environment JOB__LORAA__R",
    ]
    assert "JOB__LORA__R?" in problems[1].remedy


def test_misspelt_overrides(job_file: str) -> None:
    problem = refused(job_file, "lora.rr=8")[0]
    assert problem.where == "command line lora.rr" and "did you mean lora.r?" in problem.remedy
    for word in ("lora..r=8", "=8", "lora.=8", ".=1", "a b=1"):
        with pytest.raises(UsageError):
            resolve(job_file, [word], {})


def test_an_empty_value_is_not_a_null(job_file: str) -> None:
    assert refused(job_file, "seed=")[0].where == "command line seed"
    assert "write null" in refused(job_file, JOB__LORA="")[0].remedy
    assert "finite" in refused(job_file, "training.learning_rate=.nan")[0].reason
    assert (
        refused(job_file, JOB__LORA__TARGET_MODULES="[a")[0].where == "environment JOB__LORA__TARGET_MODULES"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"null\n", "empty"),
        (b"{}\n", "empty"),
        (b"- a\n- b\n", "a list"),
        (b"just words\n", "text"),
        (b"8\n", "a whole number"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
        (b"name: \xff\n", "not UTF-8"),
        (b"\xff\xfen\x00a\x00", "not UTF-8"),
        (b"a: \x00\n", "YAML does not allow"),
        (b"a:\n\t- b\n", "tab"),
        (b"a: &a [*a]\n", "alias"),
        (b"[" * 100_000, "deeper"),
        (b"a: " + b"9" * 100_000, "finite"),
        (b"x" * (4 * MAX_CHARACTERS + 2), "larger than"),
    ],
)
def test_what_is_no_job_is_said_plainly(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    problems = refused(str(file))
    assert any(reason in problem.reason for problem in problems)
    assert all(problem.where.startswith(str(file)) for problem in problems)


def test_the_place_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"name: a\nseed: \xff\n")
    assert refused(str(file))[0].where == f"{file}:2:7"


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert resolve(str(file), [], {}).job.name == "from-file"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in refused(str(tmp_path / "none.yaml"))[0].reason
    assert "directory" in refused(str(tmp_path))[0].reason
    assert "null byte" in refused("a\x00b")[0].reason
    assert "not the address of an object" in refused(None, JOB_FILE="s3://bucket/folder/")[0].reason
    assert "reserved" in refused("https://host/job.yaml")[0].reason

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    with pytest.raises(AccessDenied, match="Permission denied"):
        resolve("job.yaml", [], {})


def test_problems_are_sorted_by_line_and_all_there(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("seed: x\nname: A\nmodel: {}\nlora: {r: 0, q: 1}\n")
    problems = refused(str(file), "evaluation.metric=x", JOB__LAUNCH__NODES="0")
    places = [problem.where.removeprefix(f"{file}:") for problem in problems]
    assert places == [
        "1:1",
        "1:7",
        "2:7",
        "3:1",
        "4:11",
        "4:14",
        "command line evaluation.metric",
        "environment JOB__LAUNCH__NODES",
    ]


def test_the_printed_job_is_the_job(tmp_path: Path) -> None:
    nasty = 'A: "quoted" \\ # no comment\n\ttab é 日本 \U0001f600 \x85 - yes'
    inline = {"JOB__DATASETS__TRAIN__0__SYSTEM_PROMPT": nasty, "JOB__LORA__R": "16"}
    resolved = resolve(
        GOOD, ["model.revision=no-yes", "model.processor={a: 'yes', b: '8', c: [], d: ''}"], inline
    )
    text = resolved_yaml(resolved)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert resolve(str(again), [], {}).job == resolved.job
    lines = {line.split("#")[0].strip(): line.rsplit("# ", 1)[-1] for line in text.splitlines()}
    assert lines["r: 16"] == "environment JOB__LORA__R"
    assert lines["lora_alpha: 16"] == f"{GOOD}:19"
    assert lines["revision: no-yes"] == "command line"
    assert lines["nodes: 1"] == "default"


def test_nothing_else_of_the_environment_is_kept() -> None:
    resolved = resolve(GOOD, [], {**os.environ, "AWS_SECRET_ACCESS_KEY": "hunter2"})
    assert "hunter2" not in repr(resolved) + resolved_yaml(resolved)


def jobs() -> list[Path]:
    return sorted((Path(__file__).parent.parent / "jobs").rglob("*.yaml"))


def test_jobs_are_shipped() -> None:
    assert len(jobs()) > 0


@pytest.mark.parametrize("file", jobs(), ids=lambda file: file.name)
def test_every_shipped_job_is_valid(file: Path) -> None:
    assert resolve(str(file), [], {}).job.name == file.stem
