"""`runner render`, the files of `k8s/`, and the pages about both, through the real command line."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from runner import cli, render_verb
from runner.settings import resolve
from runner.targets import TARGETS
from runner.targets.template import load, merge
from tests import api_rules
from tests.submitted import PLACES, ROOT, submit
from tests.test_targets import VERSIONS

PAGES = [ROOT / "docs" / "kubernetes.md", ROOT / "docs" / "batch.md"]
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line
]
OVERLAYS = ["base", *(f"overlays/{path.name}" for path in sorted((ROOT / "k8s" / "overlays").iterdir()))]

PLANTED = {
    "HF_TOKEN": "hf_plantedplantedplanted",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key",
    "AWS_SESSION_TOKEN": "planted-session",
    "WANDB_API_KEY": "planted-wandb",
}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
Tree = dict[str, Any]


@functools.cache
def build(overlay: str) -> list[Tree]:
    done = subprocess.run(
        ["kubectl", "kustomize", f"k8s/{overlay}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [dict(tree) for tree in yaml.safe_load_all(done.stdout)]


def of_kind(trees: list[Tree], kind: str) -> Tree:
    (one,) = [tree for tree in trees if tree["kind"] == kind]
    return copy.deepcopy(one)


@pytest.mark.parametrize("target", TARGETS)
def test_render_prints_what_reads_back(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["render", target, "jobs/demo-sft.yaml", *PLACES, "--name", "demo-sft-12345"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    trees = TARGETS[target](submit(*PLACES))
    if target == "aws-batch":
        assert json.loads(out) == {key: value for tree in trees for key, value in tree.items()}
    elif target == "gcp-batch":
        assert json.loads(out) == trees[0]
        assert "gcloud batch jobs submit demo-sft-12345 --location=us-central1 --config=job.json" in err
    else:
        found = list(yaml.safe_load_all(out))
        (text,) = [tree["data"]["job.yaml"] for tree in found if tree["kind"] == "ConfigMap"]
        assert resolve(None, [], {"JOB_YAML": text}).job == submit(*PLACES).job
        for tree in (*found, *trees):
            tree.pop("data", None)  # names the file as it was named
        assert found == trees
        assert "&id" not in out
    assert cli.main(words) == 0
    assert capsys.readouterr().out == out


def test_the_folder_of_a_job_is_nobodys_business(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for folder in ("one", "another"):
        (tmp_path / folder).mkdir()
        job = shutil.copy(ROOT / "jobs" / "demo-sft.yaml", tmp_path / folder)
        assert cli.main(["render", "kubernetes", job, *PLACES]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "# demo-sft.yaml:" in shown[0]


@needs_kubectl
@pytest.mark.parametrize("text", ["y", "N", "1e3", "1.5E3", "08", "0o17", ".5e-3", "0B11"])
def test_text_stays_text_for_kubectl(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kubectl's YAML has truth values and numbers that are text for PyYAML."""
    words = [f"kubernetes.env={{A: '{text}'}}"]
    words += [] if text.startswith(".") else [f"kubernetes.labels={{team: '{text}'}}"]
    assert cli.main(["render", "kubernetes", "jobs/demo-sft.yaml", *PLACES, *words]) == 0
    file = tmp_path / "objects.yaml"
    file.write_text(capsys.readouterr().out)
    command = ["kubectl", "annotate", "--local", "--filename", str(file), "a=b", "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f'"name": "A",\n                                "value": "{text}"' in done.stdout


def test_the_verb_knows_every_target() -> None:
    assert tuple(TARGETS) == render_verb.NAMES


def test_an_unknown_target_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "nomad", "jobs/demo-sft.yaml"]) == 64
    assert "kubernetes" in capsys.readouterr().err


def test_a_refusal_is_a_bad_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "kubernetes", "jobs/demo-sft.yaml"]) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert "checkpoints.uri" in err and "kubernetes.image" in err
    assert "2 problems in the job; nothing was started" in err


@pytest.mark.parametrize("target", TARGETS)
def test_no_secret_of_the_environment_is_rendered(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["render", target, "jobs/demo-sft.yaml", *PLACES]) == 0
    printed = "".join(capsys.readouterr())
    assert not [name for name, value in PLANTED.items() if value in printed]


def test_render_loads_no_client() -> None:
    script = (
        "import sys; from runner import cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'boto3', 'botocore', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(code or len(heavy))"
    )
    words = ["render", "aws-batch", "jobs/demo-sft.yaml", *PLACES]
    subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, check=True, capture_output=True, timeout=60
    )


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_what_a_cluster_takes(overlay: str) -> None:
    trees = build(overlay)
    for tree in trees:
        for version in VERSIONS:
            kubernetes_validate.validate(tree, version, strict=True)
        api_rules.check(tree)
    config = of_kind(trees, "ConfigMap")
    assert config["immutable"] is True
    job = of_kind(trees, "Job")
    volumes = job["spec"]["template"]["spec"]["volumes"]
    assert [one["configMap"]["name"] for one in volumes if one["name"] == "job"] == [
        config["metadata"]["name"]
    ]
    found = resolve(None, [], {"JOB_YAML": config["data"]["job.yaml"]}).job
    assert found.launch.nodes == job["spec"].get("completions", 1)
    assert found.checkpoints.uri == "s3://my-bucket/runs"


@needs_kubectl
@pytest.mark.parametrize("cloud", ["aws", "gke", "azure"])
def test_our_merge_is_kustomizes(cloud: str) -> None:
    """The same patch over the same base, by both."""
    built = of_kind(build(f"overlays/{cloud}-spot"), "Job")
    ours = merge(load("kubernetes/base/train.yaml"), load(f"kubernetes/overlays/{cloud}-spot/patch.yaml"))
    spec = built["spec"]["template"]["spec"]
    spec["containers"][0]["image"] = "vlm-runner"
    next(one for one in spec["volumes"] if one["name"] == "job")["configMap"]["name"] = "vlm-runner-job"
    for one in (spec, ours["spec"]["template"]["spec"]):
        for name in ("volumes", "tolerations"):
            one[name].sort(key=lambda item: item.get("name") or item["key"])
        one["containers"][0]["env"].sort(key=lambda item: item["name"])
        one["containers"][0]["volumeMounts"].sort(key=lambda item: item["mountPath"])
    assert built == ours


@needs_kubectl
def test_a_component_closes_the_network(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "closed"
    overlay.mkdir()
    content = {"resources": ["../../base"], "components": ["../../components/network-policy"]}
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(["kubectl", "kustomize", overlay], check=True, capture_output=True, text=True)
    policy = of_kind(list(yaml.safe_load_all(done.stdout)), "NetworkPolicy")
    kubernetes_validate.validate(policy, VERSIONS[-1], strict=True)
    (excepted,) = policy["spec"]["egress"][2]["to"][0]["ipBlock"]["except"]
    assert excepted == "169.254.169.254/32"


def test_the_role_of_who_submits_is_the_least() -> None:
    role, binding = yaml.safe_load_all((ROOT / "k8s" / "base" / "submitter.yaml").read_text("utf-8"))
    assert role["kind"] == "Role" and binding["roleRef"]["name"] == role["metadata"]["name"]
    verbs = {verb for rule in role["rules"] for verb in rule["verbs"]}
    assert "*" not in verbs | {name for rule in role["rules"] for name in rule["resources"]}
    assert not {"secrets", "pods/exec"} & {name for rule in role["rules"] for name in rule["resources"]}
    account = yaml.safe_load((ROOT / "k8s" / "base" / "service-account.yaml").read_text("utf-8"))
    assert account["automountServiceAccountToken"] is False
    assert [subject["kind"] for subject in binding["subjects"]] == ["Group"], "never the pods' own account"


def test_the_templates_are_the_files_of_k8s() -> None:
    link = ROOT / "runner" / "targets" / "templates" / "kubernetes"
    assert link.is_symlink() and link.resolve() == ROOT / "k8s"


def test_a_wheel_carries_the_templates(tmp_path: Path) -> None:
    """Built from a copy of the repository with its link, as a checkout has it."""
    source = tmp_path / "source"
    quiet = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "runner", source / "runner", symlinks=True, ignore=quiet)
    shutil.copytree(ROOT / "k8s", source / "k8s")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", source], cwd=tmp_path, check=True, timeout=120)
    (wheel,) = tmp_path.glob("vlm_runner-*.whl")
    installed = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, installed], check=True, capture_output=True)
    script = (
        "import sys, runner.targets; from runner import cli; assert sys.argv[1] in runner.targets.__file__;"
        "sys.exit(max(cli.main(['render', name, *sys.argv[2:]]) for name in runner.targets.TARGETS))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed), str(ROOT / "jobs" / "demo-sft.yaml"), *PLACES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_pages_were_found() -> None:
    assert len(COMMANDS) >= 8
    assert all(command.startswith(("runner render ", "kubectl kustomize ")) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command)
    if program == "runner":
        assert cli.main(words) == 0
        assert capsys.readouterr().out
    elif shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    else:
        assert build(words[1].removeprefix("k8s/"))


def test_the_page_says_what_the_rules_are() -> None:
    """Numbers of the page that are numbers of the templates."""
    page = PAGES[0].read_text("utf-8")
    for cloud in ("aws", "gke", "azure"):
        spec = load(f"kubernetes/overlays/{cloud}-spot/patch.yaml")["spec"]["template"]["spec"]
        (told,) = [one["value"] for one in spec["containers"][0]["env"]]
        row = f"| `cloud: {cloud}`, spot | {spec['terminationGracePeriodSeconds']} s | {told} s"
        assert row in page
