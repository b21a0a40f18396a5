"""`runner submit | logs | cancel` on Kubernetes: the real kubectl, and an API server of the tests' own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner import cli
from runner.cluster import act, following, kubectl, kubernetes
from runner.cluster.refusals import reason_of
from runner.targets import render, submission
from tests import fake_cluster as fake
from tests.cluster_jobs import (
    KUBERNETES,
    PLANTED,
    documented,
    documented_commands,
    plant,
    resolved,
    written,
)
from tests.fake_cluster import FakeCluster

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl on PATH")

DRY = ["POST pods dry", "POST configmaps dry", "POST jobs dry"]
"""What is tried before anything is made."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(kubernetes, "PAUSE", 0.0)
    with FakeCluster() as server:
        os.environ["KUBECONFIG"] = server.kubeconfig(tmp_path / "kubeconfig")
        yield server


@pytest.fixture
def job(tmp_path: Path) -> str:
    return written(tmp_path, KUBERNETES)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def only(cluster: FakeCluster) -> dict[str, Any]:
    [made] = cluster.of("jobs")
    return made


# --- submit ---


def test_everything_is_tried_then_made_and_owned(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "submit", job)
    assert (code, err) == (0, "")
    assert cluster.lines == ["GET jobs", *DRY, "POST jobs", "POST configmaps"]
    made = only(cluster)
    name = made["metadata"]["name"]
    assert name.startswith("charts-") and len(name) == len("charts-") + 5
    assert f"submitted {name} to namespace team, context fake" in out and f"runner cancel {name}" in out
    [config] = cluster.of("configmaps")
    assert [owner["uid"] for owner in config["metadata"]["ownerReferences"]] == [made["metadata"]["uid"]]
    assert config["immutable"] is True
    cluster.delete("jobs", "team", name)
    assert cluster.objects == {}


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_is_sent_is_what_render_prints(cluster: FakeCluster, job: str, nodes: int) -> None:
    words = [f"launch.nodes={nodes}"]
    assert cli.main(["submit", job, *words]) == 0
    name = only(cluster)["metadata"]["name"]
    printed = render("kubernetes", submission(resolved(job, *words), name))
    sent = [request.body for request in cluster.requests if request.method == "POST"]
    tried = [request.body for request in cluster.requests if "dryRun" in request.query]
    assert tried[1:] == printed
    template = next(one for one in printed if one["kind"] == "Job")["spec"]["template"]
    assert tried[0]["spec"] == template["spec"]
    made = {body["kind"]: body for body in sent[len(tried) :]}
    for body in made.values():
        body["metadata"].pop("ownerReferences", None)
    assert made == {one["kind"]: one for one in printed}


def test_the_job_says_the_namespace_and_the_command_line_the_context(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "submit", job, "kubernetes.namespace=default", "--context", "other")
    assert code == 0 and "namespace default, context other" in out
    assert {key[1] for key in cluster.objects} == {"default"}


def test_the_printed_commands_look_where_the_job_is(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another namespace and another context than the current ones."""
    words = ["submit", job, "kubernetes.namespace=default", "--context", "other"]
    _, out, _ = run(capsys, *words)
    name = only(cluster)["metadata"]["name"]
    logs, cancel = (line.split()[1:] for line in out.splitlines()[1:])
    _, _, err = run(capsys, *words)
    assert f"(runner {' '.join(cancel)})" in err and f"(runner {' '.join(logs)})" in err
    fake.running()(cluster, only(cluster))
    cluster.logs[f"{name}-00000"] = "step 1\n"
    assert run(capsys, *logs[:2], *logs[3:])[:2] == (0, "step 1\n")
    assert run(capsys, *cancel)[0] == 0 and cluster.objects == {}


def test_the_role_of_who_submits_is_what_is_asked(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each verb of the Role is used by some command, and no other is."""
    cluster.kueue = True
    cluster.put("localqueues", {"metadata": {"name": "gpu"}})
    cluster.plan(fake.suspended("no quota"), fake.unschedulable("0/3"), fake.running(), fake.ended(0))
    queued = [job, "kubernetes.queue=gpu", "launch.nodes=2"]
    assert cli.main(["submit", *queued, "--watch"]) == 0
    assert cli.main(["logs", job]) == 0
    only(cluster)["status"] = {}
    assert cli.main(["cancel", job]) == 0
    asked = set()
    for request in cluster.requests:
        if found := re.fullmatch(r".*/namespaces/\w+/(\w+)(/[^/]+)?(/log)?", request.path):
            verb = {"GET": "get" if found[2] else "list", "POST": "create", "DELETE": "delete"}
            asked.add((f"{found[1]}{found[3] or ''}", verb[request.method]))
    [role, _] = yaml.safe_load_all((Path(__file__).parents[1] / "k8s/base/submitter.yaml").read_text())
    granted = {(name, verb) for one in role["rules"] for name in one["resources"] for verb in one["verbs"]}
    assert asked == granted


def test_a_server_that_is_no_kubernetes(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "SERVED", {})
    for verb in ("submit", "logs", "cancel"):
        code, out, err = run(capsys, verb, job)
        assert (code, out) == (78, "") and "serves batch/v1" in err


def test_a_run_has_one_submission_at_a_time(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", job]) == 0
    first = only(cluster)["metadata"]["name"]
    before = len(cluster.requests)
    code, _, err = run(capsys, "submit", job)
    assert code == 76 and f"its submission {first} is alive" in err and f"runner cancel {first}" in err
    assert cluster.lines[before:] == ["GET jobs"]
    only(cluster)["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    assert cli.main(["submit", job]) == 0
    assert len({one["metadata"]["name"] for one in cluster.of("jobs")}) == 2
    assert cli.main(["submit", job, "name=other"]) == 0


@pytest.mark.parametrize(
    ("set_up", "words", "code", "says"),
    [
        ({"restricted": True, "quota": {"nvidia.com/gpu": 0}}, [], 78, "exceeded quota: team"),
        ({"service_accounts": set()}, [], 78, 'serviceaccount "vlm-runner" not found'),
        ({"denied": {("create", "jobs")}}, [], 77, 'cannot create resource "jobs"'),
        ({"denied": {("list", "jobs")}}, [], 77, "ask for the role that k8s/ has"),
        ({}, ["kubernetes.namespace=none"], 78, "kubectl create namespace none"),
        ({}, ["kubernetes.queue=gpu"], 78, "has no Kueue"),
        ({"kueue": True}, ["kubernetes.queue=gpu"], 78, "there is no such LocalQueue"),
        ({}, ["--context", "nowhere"], 64, "kubectl config get-contexts"),
        ({}, ["--context", "gone"], 74, "127.0.0.1:9 was refused"),
    ],
)
def test_a_cluster_that_refuses_gets_nothing(
    cluster: FakeCluster,
    job: str,
    capsys: pytest.CaptureFixture[str],
    set_up: dict[str, Any],
    words: list[str],
    code: int,
    says: str,
) -> None:
    for name, value in set_up.items():
        setattr(cluster, name, value)
    got, out, err = run(capsys, "submit", job, *words)
    assert (got, out) == (code, "")
    assert says in err and err.count("remedy: ") == 1 and "Traceback" not in err
    assert cluster.objects == {}
    assert [line for line in cluster.lines if line.startswith("POST") and "dry" not in line] == []


def test_pod_security_is_asked_of_the_template(
    cluster: FakeCluster, job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.restricted = True
    assert cli.main(["submit", job]) == 0  # what render makes is restricted

    def loose(target: str, one: Any) -> Any:
        documents = render(target, one)
        del documents[-1]["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
        return documents

    monkeypatch.setattr(act, "render", loose)
    code, _, err = run(capsys, "submit", job, "name=loose")
    assert code == 78 and 'violates PodSecurity "restricted:latest": runAsNonRoot' in err
    assert len(cluster.of("jobs")) == 1


def test_unknown_fields_are_refused(
    cluster: FakeCluster, job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def newer(target: str, one: Any) -> Any:
        documents = render(target, one)
        documents[-1]["spec"]["fromTheFuture"] = 1
        return documents

    monkeypatch.setattr(act, "render", newer)
    code, _, err = run(capsys, "submit", job)
    assert code == 78 and 'unknown field "spec.fromTheFuture"' in err and cluster.objects == {}


def test_who_may_not_make_pods_is_warned(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.denied = {("create", "pods")}
    cluster.warning = "would violate something"
    code, _, err = run(capsys, "submit", job)
    assert code == 0 and "whether the cluster takes the job's pods is not known" in err
    assert "the cluster warns of Job: would violate something" in err


def test_a_queue_that_is_there(cluster: FakeCluster, job: str) -> None:
    cluster.kueue = True
    cluster.put("localqueues", {"metadata": {"name": "gpu"}})
    assert cli.main(["submit", job, "kubernetes.queue=gpu"]) == 0
    assert only(cluster)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"


def test_bad_credentials(
    cluster: FakeCluster, job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["KUBECONFIG"] = cluster.kubeconfig(tmp_path / "other", token="wrong")
    code, _, err = run(capsys, "submit", job)
    assert code == 77 and "log in to the cluster again" in err and cluster.objects == {}


def test_no_kubectl_and_no_kubeconfig(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["KUBECONFIG"] = str(tmp_path / "none")
    code, _, err = run(capsys, "submit", job)
    assert code == 64 and "kubectl config use-context" in err
    os.environ["PATH"] = str(tmp_path)
    code, _, err = run(capsys, "submit", job)
    assert code == 64 and "there is no kubectl on PATH" in err


@pytest.mark.parametrize(
    ("found", "instead", "says"),
    [
        ('"contexts": [', '"contexts": [[', "kubectl config view shows it"),
        ("certificate-authority-data", "ignored", "certificate-authority of the context's cluster"),
    ],
)
def test_a_kubeconfig_that_is_wrong_is_no_silent_cluster(
    cluster: FakeCluster,
    job: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: str,
    instead: str,
    says: str,
) -> None:
    """No waiting would mend it."""
    file = tmp_path / "kubeconfig"
    file.write_text(file.read_text().replace(found, instead))
    code, out, err = run(capsys, "submit", job)
    assert (code, out) == (64, "") and says in err and err.count("remedy: ") == 1
    assert cluster.objects == {}


WHOLE = ["GET jobs", "POST pods dry", "POST configmaps dry", "POST services dry", "POST jobs dry"]
WHOLE += ["POST jobs", "POST configmaps", "POST services"]


@pytest.mark.parametrize(
    ("number", "how"),
    [
        *((number, "503") for number in range(len(WHOLE))),
        *((number, how) for number in range(5, len(WHOLE)) for how in ("lost", "signal", "hangup")),
        (2, "signal"),
    ],
)
def test_a_failure_of_any_request_leaves_nothing(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str], number: int, how: str
) -> None:
    """Refused, acted upon with the answer lost, or just then Ctrl-C or the end of the terminal."""
    signals = {"signal": signal.SIGINT, "hangup": signal.SIGHUP}
    if how in signals:
        cluster.at_request[number] = lambda: os.kill(os.getpid(), signals[how])
    else:
        cluster.faults[number] = how
    code, out, err = run(capsys, "submit", job, "launch.nodes=2")
    assert cluster.lines[: number + 1] == WHOLE[: number + 1]
    assert (code, out) == (130 if how in signals else 74, ""), err
    assert cluster.objects == {}
    made = [line for line in cluster.lines if line in WHOLE[5:]]
    assert cluster.lines[-1] == "DELETE jobs" if made else "DELETE jobs" not in cluster.lines


def test_a_terminals_ctrl_c_waits_for_the_request(cluster: FakeCluster, job: str) -> None:
    """It goes to all that a shell's command has started, kubectl too."""
    started: list[subprocess.Popen[str]] = []
    cluster.at_request[5] = lambda: os.killpg(started[0].pid, signal.SIGINT)
    started.append(
        subprocess.Popen(
            [sys.executable, "-m", "runner", "submit", job],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )
    _, err = started[0].communicate(timeout=60)
    assert (started[0].returncode, err) == (130, "interrupted\n")
    assert cluster.lines[-2:] == ["POST configmaps", "DELETE jobs"]
    assert cluster.objects == {}


def test_what_cannot_be_taken_back_is_named(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.faults = {5: "503", 6: "503"}  # the ConfigMap, and the deletion
    code, _, err = run(capsys, "submit", job)
    name = only(cluster)["metadata"]["name"]
    assert code == 74 and f"kubectl delete job {name} --namespace team --context fake" in err
    begun, _, failed = err.partition("create ConfigMap")
    assert (begun.count("remedy: "), failed.count("remedy: ")) == (1, 1)


def test_no_secret_of_the_environment_is_sent(cluster: FakeCluster, job: str) -> None:
    plant()
    cluster.plan(fake.running(), fake.ended(0))
    assert cli.main(["submit", job, "--watch"]) == 0
    assert cli.main(["cancel", job]) == 0
    assert len(cluster.requests) > 8
    assert [one.line for one in cluster.requests if PLANTED in one.raw] == []


# --- watch ---

PULL = "registry.example.com/vlm-runner:1"


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([fake.nothing()], "no pod yet"),
        (
            [fake.no_pods('pods "x" is forbidden: exceeded quota: team')],
            "its pods are refused: Error creating",
        ),
        (
            [fake.unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")],
            "no node takes it: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ),
        (
            [fake.container_waits("ImagePullBackOff", "Back-off pulling image: 401 Unauthorized")],
            f"the image {PULL} cannot be pulled (ImagePullBackOff): Back-off pulling image: 401 Unauthorized",
        ),
        (
            [fake.container_waits("CreateContainerConfigError", 'secret "hf" not found')],
            'the container cannot be made (CreateContainerConfigError): secret "hf" not found',
        ),
        (
            [fake.mount_fails('configmap "charts" not found')],
            'ContainerCreating: FailedMount: configmap "charts" not found',
        ),
        ([fake.suspended()], "waits in queue gpu\n"),
        (
            [fake.suspended("insufficient unused quota for nvidia.com/gpu in flavor spot, 1 more needed")],
            "waits in queue gpu: insufficient unused quota for nvidia.com/gpu in flavor spot, 1 more needed",
        ),
        ([fake.running(), fake.node_lost()], "node node-1 does not answer, and no other pod starts"),
        (
            [fake.pod_ends(75, {"message": "preempted by a notice", "step": 40, "exit_code": 75})],
            "waits for its next pod after exit 75, step 40: preempted by a notice",
        ),
        (
            [fake.running(), fake.pod_gone("DeletionByPodGC", "node no longer exists")],
            "-00000: DeletionByPodGC: node no longer exists (the pause doubles",
        ),
        (
            [fake.pod_refused("Evicted", "The node was low on resource: ephemeral-storage.")],
            "-00000: Evicted: The node was low on resource: ephemeral-storage. (the pause doubles",
        ),
    ],
)
def test_watch_names_what_keeps_it_waiting(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str], stages: list[fake.Stage], says: str
) -> None:
    cluster.kueue = True
    cluster.put("localqueues", {"metadata": {"name": "gpu"}})
    cluster.plan(*stages, fake.running(), fake.ended(0))
    code, out, err = run(capsys, "submit", job, "kubernetes.queue=gpu", "--watch")
    assert (code, err) == (0, "")
    name = only(cluster)["metadata"]["name"]
    lines = [line for line in out.splitlines() if line.startswith(f"{name}: ")]
    assert says in f"{lines[-3]}\n"
    assert lines[-2].startswith(f"{name}: runs: {name}-0000") and lines[-2].endswith(" on node-1")
    assert lines[-1] == f"{name}: done"


def test_watch_ends_with_the_runs_own_code(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.plan(
        fake.running(),
        fake.pod_ends(75, {"message": "preempted", "step": 7}),
        fake.running(),
        fake.ended(93, {"message": "step 8 failed twice", "step": 7}, "exit code 93 matching FailJob rule"),
    )
    code, out, _ = run(capsys, "submit", job, "--watch")
    assert code == 93
    assert "failed: exit 93, step 7: step 8 failed twice (exit code 93 matching FailJob rule)" in out
    assert out.count(": runs: ") == 2


@pytest.mark.parametrize(
    ("last", "code", "says"),
    [
        (
            fake.finished("Failed", "DeadlineExceeded", "Job was active too long"),
            1,
            "DeadlineExceeded Job was",
        ),
        (fake.vanished(), 1, "deleted"),
        (fake.ended(137), 137, "failed: exit 137: Error"),
        (fake.ended(78, why="matching FailJob rule at index 1"), 78, "failed: exit 78"),
    ],
)
def test_watch_of_other_ends(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str], last: fake.Stage, code: int, says: str
) -> None:
    cluster.plan(fake.running(), last)
    got, out, _ = run(capsys, "submit", job, "--watch")
    assert got == code and says in out


def test_watch_waits_for_a_silent_cluster(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.plan(fake.running(), fake.ended(0))
    cluster.faults = {6: "503", 7: "503"}
    code, out, _ = run(capsys, "submit", job, "--watch")
    assert code == 0 and out.count("there is no answer") == 1 and out.endswith(": done\n")
    monkeypatch.setattr(following, "PATIENCE", 0.0)
    cluster.objects.clear()
    cluster.faults = dict.fromkeys(range(len(cluster.requests) + 6, 100), "503")
    code, _, err = run(capsys, "submit", job, "--watch")
    assert code == 74 and "itself goes on" in err and len(cluster.of("jobs")) == 1


# --- logs, cancel, describe ---


def submitted(cluster: FakeCluster, job: str, *stages: fake.Stage) -> str:
    assert cli.main(["submit", job]) == 0
    for stage in stages:
        stage(cluster, only(cluster))
    return str(only(cluster)["metadata"]["name"])


def test_logs_of_a_run_a_submission_and_nothing(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = submitted(cluster, job)
    capsys.readouterr()
    code, out, err = run(capsys, "logs", job)
    assert code == 64 and out == "" and f"{name} has no log: no pod yet" in err
    fake.running()(cluster, only(cluster))
    cluster.logs[f"{name}-00000"] = "step 1\nstep 2\n"
    for words in ([job], ["charts"], [name]):
        assert run(capsys, "logs", *words) == (0, "step 1\nstep 2\n", "")
    code, _, err = run(capsys, "logs", "chart")
    assert code == 64 and "no run and no submission of this name" in err


def test_logs_follow_goes_on_with_the_next_pod(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = submitted(cluster, job)
    capsys.readouterr()
    cluster.logs = {f"{name}-00000": "step 1\n", f"{name}-00001": "step 2\n"}
    cluster.plan(
        fake.nothing(), fake.running(), fake.pod_ends(75), fake.running(), fake.ended(0), fake.ended(0)
    )
    assert run(capsys, "logs", name, "--follow") == (0, "step 1\nstep 2\n", "")


def test_cancel_ends_what_is_alive(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = submitted(cluster, job, fake.running())
    capsys.readouterr()
    code, out, _ = run(capsys, "cancel", job)
    assert code == 0 and f"{name}: deleted" in out
    assert cluster.objects == {}
    [deletion] = [request for request in cluster.requests if request.method == "DELETE"]
    assert deletion.body["propagationPolicy"] == "Background"
    code, _, err = run(capsys, "cancel", job)
    assert code == 64 and "no run and no submission" in err
    name = submitted(cluster, job, fake.ended(0))
    capsys.readouterr()
    code, out, _ = run(capsys, "cancel", name)
    assert code == 0 and "nothing of it is alive" in out and len(cluster.of("jobs")) == 1


def test_describe_is_for_status(cluster: FakeCluster, job: str) -> None:
    settings = resolved(job)
    assert act.describe(settings.job) == []
    name = submitted(cluster, job, fake.unschedulable("0/3 nodes are available"))
    [line] = act.describe(settings.job)
    assert line.startswith(f"{name} in namespace team, context fake: pod {name}-00000: no node takes it: 0/3")


def test_status_tells_of_submissions_and_does_without(
    cluster: FakeCluster,
    job: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = submitted(cluster, job, fake.unschedulable("0/3 nodes are available"))
    capsys.readouterr()
    here = f"checkpoints.uri={tmp_path}/store"
    code, out, _ = run(capsys, "status", job, here)
    assert code == 0 and "nothing yet: no command has begun the run" in out
    assert f"  {name} in namespace team, context fake: pod {name}-00000: no node takes it" in out
    code, out, _ = run(capsys, "status", job, here, "--json")
    said = json.loads(out)
    assert code == 0 and said["state"] is None and name in said["submissions"][0]
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, out, _ = run(capsys, "status", job, here)
    assert code == 0 and "its submissions are not known: " in out
    (tmp_path / "store" / "charts").mkdir(parents=True, exist_ok=True)
    code, _, err = run(capsys, "status", f"{tmp_path}/store/charts")
    assert code == 65 and "no run" in err.lower(), err


def test_a_job_without_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {**KUBERNETES, "aws_batch": {"image": "i", "queue": "q"}}
    code, _, err = run(capsys, "submit", written(tmp_path, both))
    assert code == 64 and "kubernetes and aws-batch" in err and "--to" in err
    neither = {key: value for key, value in KUBERNETES.items() if key != "kubernetes"}
    code, _, err = run(capsys, "submit", written(tmp_path, neither))
    assert code == 64 and "nowhere to submit it to" in err


def test_words_of_kubectl() -> None:
    assert reason_of('Warning: w\nError from server (Forbidden): pods "a" is forbidden: x\n') == (
        "Forbidden",
        'pods "a" is forbidden: x',
    )
    assert reason_of("The request is invalid: spec.x: bad\n") == ("Invalid", "spec.x: bad")
    assert reason_of("Unable to connect to the server: EOF") == ("", "Unable to connect to the server: EOF")


def test_make_submit() -> None:
    words = ["make", "--dry-run", "submit", "JOB=jobs/mine.yaml", "SET=name=made", "ARGS=--watch"]
    root = Path(__file__).parents[1]
    printed = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
    assert 'runner submit "jobs/mine.yaml" name=made --watch' in printed


def test_the_commands_of_the_docs_run(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-job.yaml").write_text(documented("yaml")[0])
    monkeypatch.chdir(tmp_path)
    cluster.plan(fake.running(), fake.ended(0))
    for command in [one for one in documented_commands() if "aws-batch" not in one and "validate" not in one]:
        if command.startswith("runner logs"):
            fake.running()(cluster, cluster.of("jobs")[-1])
            cluster.plan(fake.ended(0))
        elif command.startswith("runner cancel"):
            cluster.of("jobs")[-1]["status"] = {}
            cluster.plan(fake.running())
        assert cli.main(command.split()[1:]) == 0, command
    assert len(cluster.of("jobs")) == 1  # the first is done and stays


def test_a_kubectl_that_hangs_is_ended(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one whose credential plugin waits for a login."""
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kubectl, "PROCESS", 0.2)
    code, _, err = run(capsys, "submit", job)
    assert code == 74 and "kubectl did not end within 0.2 s" in err


def test_a_log_that_may_not_be_read(
    cluster: FakeCluster, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = submitted(cluster, job, fake.running())
    capsys.readouterr()
    cluster.faults[len(cluster.requests) + 2] = "503"  # after the Jobs of this name, and the pods
    code, out, err = run(capsys, "logs", job)
    assert (code, out) == (74, "") and f"read the log of {name}-00000" in err
