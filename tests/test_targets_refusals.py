"""What a target cannot do is refused before anything is made, every problem with its key and the way out."""

from __future__ import annotations

import re

import pytest

from runner import places
from runner.errors import JobError, Problem
from runner.job.yaml_source import MAX_CHARACTERS
from runner.settings import resolve
from runner.targets import TARGETS, refusals, render
from runner.targets.submission import SUFFIX
from tests.submitted import PLACES, ROOT, STORE, submit

CLUSTERS = ("kubernetes", "jobset", "trainjob")
CLOUDS = ("aws-batch", "gcp-batch")


def problems(target: str, *overrides: str, name: str | None = "demo-sft-12345") -> list[Problem]:
    with pytest.raises(JobError) as refused:
        render(target, submit(*PLACES, *overrides, name=name))
    assert refused.value.exit_code == 78
    assert all(problem.path and problem.reason and problem.remedy for problem in refused.value.problems)
    return refused.value.problems


def only(target: str, *overrides: str, name: str | None = "demo-sft-12345") -> Problem:
    (problem,) = problems(target, *overrides, name=name)
    return problem


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("checkpoints.uri=null", "checkpoints.uri", "s3://bucket/prefix"),
        ("checkpoints.uri=/mnt/checkpoints", "checkpoints.uri", "s3://bucket/prefix"),
        ("checkpoints.uri=file:///mnt/checkpoints", "checkpoints.uri", "s3://bucket/prefix"),
        ("model.name_or_path=/home/me/model", "model.name_or_path", "hub"),
        ("model.name_or_path=./model", "model.name_or_path", "hub"),
        ("datasets.train.0.path=rows.jsonl", "datasets.train[0].path", "hub"),
        ("datasets.eval.0.path=~/rows", "datasets.eval[0].path", "hub"),
        ("datasets.train.0.image_folder=../images", "datasets.train[0].image_folder", "hub"),
        ("lora.init_from=runs/a/adapter", "lora.init_from", "hub"),
        ("resources.shm=64Gi", "resources.shm", "smaller"),
        ("launch.gpus_per_node=4", "launch.gpus_per_node", "same number"),
    ],
)
def test_what_no_target_can_do(target: str, override: str, key: str, said: str) -> None:
    problem = only(target, override)
    assert problem.path == key
    assert said in problem.reason + problem.remedy


@pytest.mark.parametrize("target", TARGETS)
def test_folders_of_the_image_are_not_local(target: str) -> None:
    render(target, submit(*PLACES, "model.name_or_path=/opt/model", "datasets.train.0.path=/opt/rows.jsonl"))


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        *((target, ["kubernetes.image"]) for target in CLUSTERS),
        ("aws-batch", ["aws_batch.image", "aws_batch.queue"]),
        ("gcp-batch", ["gcp_batch.image", "gcp_batch.machine_type"]),
    ],
)
def test_what_is_missing(target: str, missing: list[str]) -> None:
    with pytest.raises(JobError) as refused:
        render(target, submit(STORE))
    assert [problem.path for problem in refused.value.problems] == missing


@pytest.mark.parametrize("target", CLOUDS)
def test_several_nodes_on_batch_say_what_can(target: str) -> None:
    problem = only(target, "launch.nodes=2", "resources.spot=true")
    assert problem.path == "launch.nodes"
    assert "jobset" in problem.remedy and "Indexed Job" in problem.remedy


@pytest.mark.parametrize("target", CLUSTERS)
def test_spot_nodes_that_nothing_names(target: str) -> None:
    assert only(target, "resources.spot=true").path == "resources.spot"
    render(target, submit(*PLACES, "resources.spot=true", "kubernetes.node_selector={spot: 'yes'}"))


def test_all_problems_at_once() -> None:
    with pytest.raises(JobError) as refused:
        render("aws-batch", submit("launch.nodes=2", "resources.shm=80Gi", "model.name_or_path=./model"))
    assert [problem.path for problem in refused.value.problems] == [
        "checkpoints.uri",
        "model.name_or_path",
        "resources.shm",
        "aws_batch.image",
        "aws_batch.queue",
        "launch.nodes",
    ]


@pytest.mark.parametrize(
    ("target", "longest", "overrides"),
    [
        ("kubernetes", 63, []),
        ("kubernetes", 61, ["launch.nodes=2"]),
        ("kubernetes", 61, ["launch.nodes=10"]),
        ("kubernetes", 60, ["launch.nodes=11"]),
        ("jobset", 48, []),
        ("jobset", 47, ["launch.nodes=11"]),
        ("trainjob", 48, []),
        ("trainjob", 46, ["launch.nodes=101"]),
        ("aws-batch", 128, []),
        ("gcp-batch", 63, []),
    ],
)
def test_names_that_become_too_long(target: str, longest: int, overrides: list[str]) -> None:
    render(target, submit(*PLACES, *overrides, name="a" * longest))
    problem = only(target, *overrides, name="a" * (longest + 1))
    assert problem.path == "name"
    assert str(longest) in problem.reason


def test_a_run_is_told_how_long_its_name_may_be() -> None:
    run = "a" * 45
    found = only("jobset", f"name={run}", name=f"{run}-12345")
    most = int(re.findall(r"at most (\d+)", found.remedy)[0])
    shorter = "a" * most
    render("jobset", submit(*PLACES, f"name={shorter}", name=f"{shorter}-12345"))
    assert most + 1 + SUFFIX == refusals.LONGEST_NAME["jobset"]


@pytest.mark.parametrize(
    ("target", "overrides"),
    [("jobset", []), ("trainjob", []), ("gcp-batch", []), ("kubernetes", ["launch.nodes=2"])],
)
def test_names_that_begin_with_a_digit(target: str, overrides: list[str]) -> None:
    assert "digit" in only(target, *overrides, name="7b-charts").reason


@pytest.mark.parametrize("name", ["Charts", "a_b", "-a", "a.b"])
def test_names_that_name_no_object(name: str) -> None:
    assert only("kubernetes", name=name).path == "name"


@pytest.mark.parametrize(
    ("target", "section"),
    [("kubernetes", "kubernetes"), ("aws-batch", "aws_batch"), ("gcp-batch", "gcp_batch")],
)
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("JOB_YAML", "a", "the runner or"),
        ("JOB__SEED", "1", "the runner or"),
        ("PET_NNODES", "2", "the target sets"),
        ("RUNNER_CACHE", "/x", "the runner or"),
        ("HOME", "/x", "the runner or"),
        ("1X", "a", "no name of a variable"),
        ("AWS_ENDPOINT_URL", "https://storage.googleapis.com", "conditional writes"),
    ],
)
def test_variables_that_may_not_be_set(target: str, section: str, name: str, value: str, said: str) -> None:
    problem = only(target, f"{section}.env={{{name}: '{value}'}}")
    assert problem.path == f"{section}.env.{name}"
    assert said in problem.reason


def test_googles_addresses_are_answered() -> None:
    with pytest.raises(JobError) as refused:
        resolve(str(ROOT / "jobs" / "demo-sft.yaml"), ["checkpoints.uri=gs://my-bucket/runs"], {})
    (problem,) = refused.value.problems
    assert problem.path == "checkpoints.uri"
    assert "conditional writes" in problem.remedy and "s3://" in problem.remedy


def test_googles_store_with_one_writer_is_the_users_word() -> None:
    endpoint = "kubernetes.env={AWS_ENDPOINT_URL: 'https://storage.googleapis.com'}"
    render("kubernetes", submit(*PLACES, endpoint, "checkpoints.allow_unfenced=true"))


@pytest.mark.parametrize(
    ("section", "entry"),
    [
        ("kubernetes", "{HF_ACCESS: hf_abcdefghijklmnopqrst}"),
        ("kubernetes", "{AWS_SECRET_ACCESS_KEY: abc}"),
        ("aws_batch", "{WANDB_API_KEY: abc}"),
        ("gcp_batch", "{URL: 'https://me:password@host/'}"),
    ],
)
def test_secrets_in_variables_are_refused_with_the_job(section: str, entry: str) -> None:
    with pytest.raises(JobError) as refused:
        resolve(str(ROOT / "jobs" / "demo-sft.yaml"), [f"{section}.env={entry}"], {})
    assert "credential" in refused.value.problems[0].reason
    assert "abc" not in str(refused.value)


@pytest.mark.parametrize("label", ["{'a b': c}", "{a: 'b c'}", f"{{a: {'b' * 64}}}"])
def test_labels_that_are_none(label: str) -> None:
    assert "is no label" in only("kubernetes", f"kubernetes.labels={label}").reason


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("kubernetes.node_selector={disk: 'very fast'}", "kubernetes.node_selector.disk"),
        ("kubernetes.node_selector={'a b': c}", "kubernetes.node_selector.a b"),
        ("resources.gpu_type='NVIDIA A100'", "resources.gpu_type"),
        ("kubernetes.annotations={'a b': c}", "kubernetes.annotations.a b"),
        ("kubernetes.tolerations=[{key: spot, value: 'yes'}]", "kubernetes.tolerations[0]"),
        ("kubernetes.tolerations=[{}, {operator: Equal, value: 'yes'}]", "kubernetes.tolerations[1]"),
    ],
)
def test_what_the_api_server_would_refuse(override: str, key: str) -> None:
    assert only("kubernetes", override).path == key


@pytest.mark.parametrize("label", ["{Team: a}", "{team: A}", "{goog-team: a}", f"{{team: {'a' * 64}}}"])
def test_labels_that_google_does_not_take(label: str) -> None:
    render("gcp-batch", submit(*PLACES, "gcp_batch.labels={team: vlm_1, empty: ''}"))
    assert only("gcp-batch", f"gcp_batch.labels={label}").path.startswith("gcp_batch.labels.")


def test_a_time_that_aws_batch_does_not_take() -> None:
    assert only("aws-batch", "resources.time_limit=59s").path == "resources.time_limit"


@pytest.mark.parametrize("name", ["vlm-runner/run", "batch.kubernetes.io/job-name", "controller-uid"])
def test_labels_of_the_runner_and_the_cluster_stay(name: str) -> None:
    assert only("kubernetes", f"kubernetes.labels={{{name!r}: other}}").path == f"kubernetes.labels.{name}"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("kubernetes.priority_class=batch", "priority_class"),
        ("kubernetes.env_from=[s3]", "env_from"),
    ],
)
def test_what_a_train_job_cannot_set(override: str, key: str) -> None:
    found = only("trainjob", override)
    assert found.path == f"kubernetes.{key}"
    assert "jobset" in found.remedy


def test_aws_batch_has_no_type_of_gpu() -> None:
    assert only("aws-batch", "resources.gpu_type=L4").path == "resources.gpu_type"


@pytest.mark.parametrize(
    ("key", "value"), [("aws_batch.attempts", 11), ("aws_batch.attempts", 0), ("gcp_batch.retries", 11)]
)
def test_more_starts_than_a_cloud_allows_are_no_job(key: str, value: int) -> None:
    with pytest.raises(JobError) as refused:
        resolve(str(ROOT / "jobs" / "demo-sft.yaml"), [f"{key}={value}"], {})
    assert [problem.path for problem in refused.value.problems] == [key]


def test_a_definition_that_is_too_large() -> None:
    found = only("aws-batch", f"aws_batch.env={{PATHS: '{'a' * 25_000}'}}")
    assert "RegisterJobDefinition" in found.reason and "24,576" in found.reason


def test_a_submission_that_is_too_large() -> None:
    tags = ", ".join(f"t{number}: {'a' * 700}" for number in range(45))
    reasons = [one.reason for one in problems("aws-batch", f"aws_batch.tags={{{tags}}}")]
    assert any("SubmitJob" in reason and "30,720" in reason for reason in reasons)


@pytest.mark.parametrize("length", [0, 3000, 5000, 8000, 20_000])
def test_overrides_are_never_too_large(length: int) -> None:
    """A job of any size: what does not fit into a variable goes through the store."""
    one = submit(*PLACES, f"datasets.train.0.system_prompt={chr(34) * length or 'a'!r}")
    assert refusals.too_large("aws-batch", render("aws-batch", one)) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_job_that_the_container_would_not_read(target: str) -> None:
    with pytest.raises(JobError) as refused:
        render(target, submit(*PLACES, f"datasets.train.0.system_prompt={'charts ' * 18_000}"))
    (problem,) = refused.value.problems
    assert f"{MAX_CHARACTERS:,}" in problem.reason
    assert 4 * MAX_CHARACTERS < 1 << 20, "a ConfigMap takes any job that is read"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resources.memory", "64"),
        ("resources.memory", "64GB"),
        ("resources.shm", "0Gi"),
        ("resources.cpu", "0"),
        ("resources.gpu", "-1"),
        ("resources.time_limit", "2d"),
        ("kubernetes.namespace", "Team"),
        ("kubernetes.namespace", "a.b"),
        ("kubernetes.service_account", "a..b"),
        ("kubernetes.queue", "q" * 64),
        ("kubernetes.cloud", "moon"),
        ("kubernetes.hf_token_from", "a/b/c"),
    ],
)
def test_values_that_no_section_takes(key: str, value: str) -> None:
    with pytest.raises(JobError) as refused:
        resolve(str(ROOT / "jobs" / "demo-sft.yaml"), [f"{key}={value}"], {})
    assert refused.value.problems[0].path == key


@pytest.mark.parametrize(
    "section", ["Resources", "Toleration", "Kubernetes", "SecretVariable", "AwsBatch", "GcpBatch"]
)
def test_every_key_is_described(section: str) -> None:
    fields = getattr(places, section).model_fields
    assert [name for name, field in fields.items() if not field.description] == []
    bare = [
        name
        for name, field in fields.items()
        if field.default is None and "Null" not in str(field.description)
    ]
    assert bare == [], "what null means"
