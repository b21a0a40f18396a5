"""`runner.targets`: what is rendered is in the golden files, is what systems accept and clusters need."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import kubernetes_validate
import pytest

from runner.manifest import Job
from runner.places import Kubernetes, Resources
from runner.section import size
from runner.settings import resolve
from runner.supervisor.direct import grace_seconds
from runner.targets import TARGETS, render, submission
from runner.targets.batch import delivery
from runner.targets.pods import grace
from runner.targets.template import merge
from tests import api_rules, custom_resources
from tests.submitted import CASES, FULL, GOLDEN, JOB, OF_PODS, PLACES, ROOT, golden, objects, rendered, submit

VERSIONS = ("1.34", "1.35", "1.36", "1.37")
"""Of Kubernetes."""

Tree = dict[str, Any]
ALL = list(objects())
NATIVE = {"Job", "Service", "ConfigMap"}


def named(found: list[tuple[str, Tree]]) -> list[str]:
    return [f"{case}-{tree['kind']}" for case, tree in found]


@pytest.mark.parametrize("place", CASES, ids="-".join)
def test_a_golden_file(place: tuple[str, str]) -> None:
    path, text = golden(*place)
    assert text.splitlines() == path.read_text("utf-8").splitlines(), (
        f"{path.relative_to(ROOT)}: if that is meant, run python -m tests.submitted and look at git diff"
    )


def test_every_golden_file_has_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden(*place)[0].name for place in CASES}
    assert {target for target, _ in CASES} == set(TARGETS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("case", "tree"), ALL, ids=named(ALL))
def test_an_object_fits_its_schema(case: str, tree: Tree, version: str) -> None:
    if tree["kind"] in NATIVE:
        kubernetes_validate.validate(tree, version, strict=True)
    elif version == VERSIONS[0]:
        custom_resources.validate(tree)
        for spec in api_rules.pod_specs(tree):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize(("case", "tree"), ALL, ids=named(ALL))
def test_an_object_keeps_the_rules_of_the_api_server(case: str, tree: Tree) -> None:
    api_rules.check(tree)


@pytest.mark.parametrize("kind", ["Job", "JobSet", "TrainJob", "ClusterTrainingRuntime"])
def test_an_unknown_field_is_seen(kind: str) -> None:
    """The validation itself: a schema that lets everything pass would pass everything."""
    tree = copy.deepcopy(next(tree for _, tree in ALL if tree["kind"] == kind))
    tree["spec"]["backofLimit"] = 1
    if kind in NATIVE:
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(tree, VERSIONS[-1], strict=True)
    else:
        with pytest.raises(custom_resources.jsonschema.ValidationError):
            custom_resources.validate(tree)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"]["template"]["spec"].update(restartPolicy="OnFailure"),
        lambda job: job["spec"].update(podReplacementPolicy="TerminatingOrFailed"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"].reverse(),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][2]["onExitCodes"]["values"].insert(0, 0),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0]["onPodConditions"][0].pop("status"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0].update(
            job["spec"]["podFailurePolicy"]["rules"][1]
        ),
        lambda job: job["metadata"].update(name="a" * 64),
        lambda job: job["spec"].update(completionMode="Indexed", completions=2, parallelism=1),
    ],
)
def test_the_rules_of_the_api_server_see_what_it_refuses(spoil: Callable[[Tree], None]) -> None:
    job = copy.deepcopy(rendered("kubernetes", "least")[-1])
    spoil(job)
    with pytest.raises((AssertionError, KeyError)):
        api_rules.check(job)


def pods() -> list[tuple[str, Tree]]:
    """Every whole pod spec: of Jobs, JobSets and the runtime."""
    return [(f"{case}-{tree['kind']}", spec) for case, tree in ALL for spec in api_rules.pod_specs(tree)]


def container(spec: Tree) -> Tree:
    (one,) = spec["containers"]
    return dict(one)


def variables(spec: Tree) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container(spec)["env"] if "value" in one}


def volume(spec: Tree, name: str) -> Tree:
    (one,) = [one for one in spec["volumes"] if one["name"] == name]
    return dict(one)


CACHES = (
    "HOME HF_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR XDG_CACHE_HOME CUDA_CACHE_PATH WANDB_DIR "
    "MPLCONFIGDIR RUNNER_CACHE"
)

POD: dict[str, Callable[[Tree], bool]] = {
    "restartPolicy": lambda spec: spec["restartPolicy"] == "Never",
    "grace": lambda spec: (
        int(variables(spec)["RUNNER_GRACE_SECONDS"]) <= spec["terminationGracePeriodSeconds"]
    ),
    "requests are limits": lambda spec: (
        container(spec)["resources"]["requests"] == container(spec)["resources"]["limits"]
        and {"cpu", "memory", "ephemeral-storage"} <= set(container(spec)["resources"]["limits"])
    ),
    "shm": lambda spec: (
        volume(spec, "shm")["emptyDir"]["medium"] == "Memory"
        and size(volume(spec, "shm")["emptyDir"]["sizeLimit"])
        < size(container(spec)["resources"]["limits"]["memory"])
    ),
    "caches": lambda spec: all(variables(spec)[name].startswith("/scratch/") for name in CACHES.split()),
    "writable": lambda spec: (
        {one["mountPath"] for one in container(spec)["volumeMounts"] if not one.get("readOnly")}
        == {"/scratch", "/tmp", "/dev/shm"}
    ),
    "config": lambda spec: any(
        one["mountPath"] == "/etc/job" and one["readOnly"] for one in container(spec)["volumeMounts"]
    ),
    "command": lambda spec: (
        container(spec)["args"] == ["train", "/etc/job/job.yaml", "--runs", "/scratch/runs"]
        and "command" not in container(spec)
    ),
    "identity": lambda spec: (
        bool(spec["serviceAccountName"])
        and spec["automountServiceAccountToken"] is False
        and spec["enableServiceLinks"] is False
    ),
    "restricted pod": lambda spec: (
        spec["securityContext"]
        == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    ),
    "restricted container": lambda spec: (
        container(spec)["securityContext"]
        == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    ),
    "silent nodes": lambda spec: (
        {one["key"] for one in spec["tolerations"] if one.get("tolerationSeconds") == 30}
        == {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
    ),
    "GPU taint": lambda spec: (
        ("nvidia.com/gpu" in container(spec)["resources"]["limits"])
        == any(one["key"] == "nvidia.com/gpu" for one in spec["tolerations"])
    ),
    "probes of the supervisor": lambda spec: all(
        container(spec)[probe]["exec"]["command"]
        == ["runner", "health", "--max-age", "120", "--runs", "/scratch/runs"]
        for probe in ("startupProbe", "livenessProbe")
    ),
    "last words": lambda spec: (
        container(spec)["terminationMessagePolicy"] == "FallbackToLogsOnError"
        and container(spec)["terminationMessagePath"]
        == variables(spec)["RUNNER_TERMINATION_LOG"]
        == "/dev/termination-log"
    ),
    "image": lambda spec: container(spec)["imagePullPolicy"] == "IfNotPresent",
    "metadata": lambda spec: variables(spec)["RUNNER_METADATA"] == "off",
    "owner": lambda spec: any(
        one["name"] == "RUNNER_JOB_UID"
        and re.fullmatch(
            r"metadata\.labels\['(batch\.kubernetes\.io/controller-uid|jobset\.sigs\.k8s\.io/jobset-uid)'\]",
            one["valueFrom"]["fieldRef"]["fieldPath"],
        )
        for one in container(spec)["env"]
    ),
}
"""Rows of the checklist that concern a pod."""


@pytest.mark.parametrize("row", POD)
@pytest.mark.parametrize(("case", "spec"), pods(), ids=[case for case, _ in pods()])
def test_a_pod_is_as_the_checklist_says(case: str, spec: Tree, row: str) -> None:
    assert POD[row](spec)


JOBS = list(objects(kind="Job"))


@pytest.mark.parametrize(("case", "job"), JOBS, ids=[case for case, _ in JOBS])
def test_a_job_is_as_the_checklist_says(case: str, job: Tree) -> None:
    spec, template = job["spec"], job["spec"]["template"]
    assert spec["backoffLimit"] == 1000
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["ttlSecondsAfterFinished"] > 0
    assert not {"suspend", "backoffLimitPerIndex", "maxFailedIndexes"} & set(spec)
    for key in ("name", "instance", "version", "component", "part-of", "managed-by"):
        assert job["metadata"]["labels"][f"app.kubernetes.io/{key}"]
        assert template["metadata"]["labels"][f"app.kubernetes.io/{key}"]
    assert job["metadata"]["labels"]["vlm-runner/run"] == "demo-sft"
    annotations = template["metadata"]["annotations"]
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_the_job_file_is_an_immutable_config_map() -> None:
    one = submit(*PLACES)
    found, job = render("kubernetes", one)
    assert found["immutable"] is True
    assert found["data"] == {"job.yaml": one.text}
    assert found["metadata"]["name"] == job["metadata"]["name"] == one.name
    assert volume(job["spec"]["template"]["spec"], "job")["configMap"] == {"name": one.name}


def test_several_nodes_are_an_indexed_job_with_a_service() -> None:
    _, service, job = rendered("kubernetes", "nodes")
    spec, name = job["spec"], job["metadata"]["name"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
    }


def test_a_queue_counts_the_time_and_a_job_without_one_has_a_deadline() -> None:
    queued = rendered("kubernetes", "full")[-1]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-spot"
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/max-exec-time-seconds"] == "172800"
    template = queued["spec"]["template"]["metadata"]
    assert (
        template["annotations"]["kueue.x-k8s.io/podset-preferred-topology"] == "cloud.google.com/gke-nodepool"
    )
    assert "kueue.x-k8s.io/queue-name" not in template["labels"]
    assert "activeDeadlineSeconds" not in queued["spec"]
    free = render("kubernetes", submit(*PLACES, "resources.time_limit=2h"))[-1]
    assert free["spec"]["activeDeadlineSeconds"] == 7200
    assert "activeDeadlineSeconds" not in rendered("trainjob", "full")[-1]["spec"]
    alone = render("trainjob", submit(*PLACES, "resources.time_limit=2h"))[-1]
    assert alone["spec"]["activeDeadlineSeconds"] == 7200


def test_a_token_is_a_file_and_has_to_be_there() -> None:
    spec = rendered("kubernetes", "full")[-1]["spec"]["template"]["spec"]
    assert volume(spec, "hf")["secret"] == {
        "secretName": "hub",
        "optional": False,
        "defaultMode": 0o440,
        "items": [{"key": "read", "path": "token"}],
    }
    assert variables(spec)["HF_TOKEN_PATH"] == "/etc/secrets/hf/token"
    assert container(spec)["envFrom"] == [{"secretRef": {"name": "s3"}}]
    without = rendered("kubernetes", "least")[-1]["spec"]["template"]["spec"]
    assert "HF_TOKEN_PATH" not in variables(without)
    assert [one["name"] for one in without["volumes"]] == ["job", "scratch", "tmp", "shm"]


def test_a_gpu_type_is_a_label_of_nodes() -> None:
    overrides = [
        *PLACES,
        "resources.gpu_type=nvidia-l4",
        "kubernetes.gpu_type_label=cloud.google.com/gke-accelerator",
    ]
    spec = render("kubernetes", submit(*overrides))[-1]["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    machine = render("gcp-batch", submit(*PLACES, "resources.gpu_type=nvidia-tesla-t4"))[0]
    policy = machine["allocationPolicy"]["instances"][0]["policy"]
    assert policy["accelerators"] == [{"type": "nvidia-tesla-t4", "count": "1"}]


@pytest.mark.parametrize(
    ("spot", "cloud", "given", "notice", "template", "result"),
    [
        (False, "gke", None, None, (110, 110), (110, 110)),
        (False, None, 60, None, (110, 110), (60, 60)),
        (True, "gke", None, None, (25, 15), (25, 15)),
        (True, "gke", 60, None, (25, 15), (60, 15)),
        (True, "gke", None, 120, (25, 15), (120, 120)),
        (True, "gke", 60, 120, (25, 15), (60, 60)),
        (True, None, None, None, (110, 110), (110, None)),
        (True, None, None, 30, (110, 110), (30, 30)),
    ],
)
def test_the_grace_that_is_true(
    spot: bool,
    cloud: Literal["gke"] | None,
    given: int | None,
    notice: int | None,
    template: tuple[int, int],
    result: tuple[int, int | None],
) -> None:
    place = Kubernetes(cloud=cloud, termination_grace_seconds=given, notice_seconds=notice)
    assert grace(Resources(spot=spot), place, *template) == result


def test_a_grace_that_nobody_knows_is_not_told() -> None:
    job = render("kubernetes", submit(*PLACES, "resources.spot=true", "kubernetes.node_selector={a: b}"))[-1]
    assert "RUNNER_GRACE_SECONDS" not in variables(job["spec"]["template"]["spec"])
    job = render("trainjob", submit(*PLACES, "resources.spot=true", "kubernetes.node_selector={a: b}"))[-1]
    assert job["spec"]["trainer"]["env"] == [{"name": "RUNNER_GRACE_SECONDS", "value": ""}]
    assert grace_seconds({"RUNNER_GRACE_SECONDS": ""}) is None


@pytest.mark.parametrize(
    ("cloud", "period", "told"), [("aws", 110, "110"), ("gke", 25, "15"), ("azure", 30, "30")]
)
def test_the_grace_of_each_clouds_spot_nodes(cloud: str, period: int, told: str) -> None:
    job = render("kubernetes", submit(*PLACES, "resources.spot=true", f"kubernetes.cloud={cloud}"))[-1]
    spec = job["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == period
    assert variables(spec)["RUNNER_GRACE_SECONDS"] == told
    on_demand = render("kubernetes", submit(*PLACES, f"kubernetes.cloud={cloud}"))[-1]
    assert on_demand["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 110


def test_a_run_of_a_job_set_belongs_to_the_set() -> None:
    """The uid of its Job is new after every restart, and would read as another submission."""
    for target in ("jobset", "trainjob"):
        text = json.dumps(rendered(target, "least"))
        assert "jobset.sigs.k8s.io/jobset-uid" in text
        assert "controller-uid" not in text


def test_a_train_job_says_what_its_runtime_does_not() -> None:
    runtime, config, job = rendered("trainjob", "full")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    assert container(node["template"]["spec"]["template"]["spec"])["name"] == "node"
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "2"
    assert {one["name"] for one in trainer["env"]} == {"RUNNER_GRACE_SECONDS", "AWS_REGION"}
    (patch,) = job["spec"]["runtimePatches"]
    (pods_,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = pods_["template"]["spec"]["template"]["spec"]
    assert volume(spec, "job")["configMap"]["name"] == config["metadata"]["name"]
    assert volume(spec, "hf")["secret"]["optional"] is False, "over the runtime's true"
    assert rendered("trainjob", "least")[0] == runtime, "the same for every job"


def test_machines_of_google_have_the_labels_of_their_job() -> None:
    (job,) = rendered("gcp-batch", "full")
    assert job["allocationPolicy"]["labels"] == job["labels"]
    assert job["labels"]["team"] == "vlm"


def test_an_aws_definition_is_the_same_for_every_submission() -> None:
    first, _ = render("aws-batch", submit(*PLACES, name="demo-sft-aaaaa"))
    second, submitted = render("aws-batch", submit(*PLACES, name="demo-sft-bbbbb"))
    assert first == second
    assert submitted["SubmitJob"]["jobName"] == "demo-sft-bbbbb"
    names = (second["RegisterJobDefinition"]["jobDefinitionName"], submitted["SubmitJob"]["jobDefinition"])
    assert names == ("vlm-runner-demo-sft",) * 2


@pytest.mark.parametrize("case", ["least", "full"])
def test_boto3_takes_what_is_rendered_for_aws(case: str) -> None:
    """Its own model of the service: names, types, and what is required."""
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.Session().get_service_model("batch")
    for tree in rendered("aws-batch", case):
        ((operation, arguments),) = tree.items()
        shape = service.operation_model(operation).input_shape
        assert ParamValidator().validate(arguments, shape).generate_report() == ""
        known = set(shape.members)
        assert set(arguments) <= known


def test_a_small_job_stands_in_a_variable_and_reads_back() -> None:
    one = submit(*PLACES)
    variable, value = delivery(one)
    assert variable == "JOB_YAML"
    assert resolve(None, [], {variable: value}).job == one.job
    (told,) = render("aws-batch", one)[1]["SubmitJob"]["containerOverrides"]["environment"]
    assert told == {"name": variable, "value": value}
    environment = render("gcp-batch", one)[0]["taskGroups"][0]["taskSpec"]["environment"]
    assert environment["variables"][variable] == value


def test_a_large_job_goes_through_the_store() -> None:
    one = submit(*PLACES, f"datasets.train.0.system_prompt={'charts ' * 15_000}")
    assert len(one.text) > 100_000
    address = "s3://my-bucket/runs/demo-sft/submissions/demo-sft-12345.yaml"
    assert delivery(one) == ("JOB_FILE", address)
    (told,) = render("aws-batch", one)[1]["SubmitJob"]["containerOverrides"]["environment"]
    assert told == {"name": "JOB_FILE", "value": address}
    text = render("kubernetes", one)[0]["data"]["job.yaml"]
    assert resolve(None, [], {"JOB_YAML": text}).job == one.job


def test_what_is_rendered_is_the_same_every_time() -> None:
    resolved = resolve(str(ROOT / "jobs" / "demo-sft.yaml"), PLACES, {})
    assert submission(resolved) == submission(resolved)
    other = resolve(str(ROOT / "jobs" / "demo-sft.yaml"), [*PLACES, "seed=1"], {})
    assert submission(resolved).name != submission(other).name
    assert re.fullmatch(r"demo-sft-[0-9a-f]{5}", submission(resolved).name)
    for target, case in CASES:
        assert rendered(target, case) == rendered(target, case)


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_job_renders(file: Any) -> None:
    one = submit(*PLACES, job=f"jobs/{file.name}", name=None)
    for target in TARGETS:
        for tree in render(target, one):
            if not target.endswith("-batch"):
                api_rules.check(tree)
    kubernetes_validate.validate(render("kubernetes", one)[-1], VERSIONS[-1], strict=True)


def test_places_may_change_between_attempts() -> None:
    from runner.supervisor.identity import Identity, Place, check_job

    old, new = submit(*PLACES).job, submit(*FULL, *OF_PODS).job
    stored = Identity(job=old.model_dump(mode="json"), pins={}, fingerprints={}, versions={})
    changed = check_job(stored, new, Place("s3://my-bucket/runs/demo-sft", ROOT / "runs" / "demo-sft"))
    assert [line.split(": ")[1] for line in changed] == ["launch.gpus_per_node"]


def test_the_golden_files_leave_the_job_out() -> None:
    assert all(JOB in path.read_text("utf-8") for path in GOLDEN.iterdir())


@pytest.mark.parametrize(
    ("base", "patch", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"env": [{"name": "A"}]}, {"env": [{"name": "B"}]}, {"env": [{"name": "A"}, {"name": "B"}]}),
        (
            {"env": [{"name": "A", "value": "1"}]},
            {"env": [{"name": "A", "value": "2"}]},
            {"env": [{"name": "A", "value": "2"}]},
        ),
        ({"env": [{"name": "A"}]}, {"env": [{"name": "A", "$patch": "delete"}]}, {"env": []}),
        ({"tolerations": [{"key": "x"}]}, {"tolerations": [{"key": "y"}]}, {"tolerations": [{"key": "y"}]}),
    ],
)
def test_merge(base: Tree, patch: Tree, merged: Tree) -> None:
    before = copy.deepcopy((base, patch))
    assert merge(base, patch) == merged
    assert (base, patch) == before


def test_a_job_without_places_has_none() -> None:
    job: Job = resolve(str(ROOT / "jobs" / "demo-sft.yaml"), [], {}).job
    assert (job.kubernetes, job.aws_batch, job.gcp_batch) == (None, None, None)
    assert job.resources.spot is False
