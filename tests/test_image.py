"""The image's recipe without a builder: lint, locks, layer order, and that its two targets differ little.

tests/image/ looks at the image itself (`make image-test`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
LOCKS = {
    path.stem.removeprefix("requirements").lstrip("-"): path for path in DOCKER.glob("requirements*.txt")
}
CUDA = ("nvidia-", "cuda-", "triton")
"""Pinned by torch's CUDA build, so not in constraints.txt."""
REQUIRES: dict[str, list[str]] = json.loads((ROOT / "tests" / "data" / "cuda-requires.json").read_text())
"""By name==version, what torch with CUDA and its libraries require: docker/lock.py wrote it down."""


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def lock(name: str) -> dict[str, str]:
    """Version by distribution; every line has one distribution, one version and SHA-256s, or is a comment."""
    found = {}
    for line in LOCKS[name].read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)", line)
            assert match is not None, line
            found[match[1]] = match[2]
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


# --- lint ---


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([tool("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_scripts_are_clean() -> None:
    scripts = sorted(DOCKER.glob("*.sh"))
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True)
    assert scripts
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert all(os.access(script, os.X_OK) for script in scripts)


# --- locks ---


def test_there_is_a_lock_for_each_layer() -> None:
    assert set(LOCKS) == {"", "torch-cpu", "torch-gpu", "build"}


@pytest.mark.parametrize("name", ["", "torch-cpu", "torch-gpu"])
def test_a_lock_has_the_versions_of_the_constraints(name: str) -> None:
    pinned = constraints()
    for distribution, version in lock(name).items():
        if name == "torch-gpu" and distribution.startswith(CUDA):
            continue
        assert version.split("+")[0] == pinned[distribution], distribution


def test_the_build_tools_agree_with_the_constraints_where_both_have_one() -> None:
    pinned = constraints()
    for distribution, version in lock("build").items():
        assert version == pinned.get(distribution, version), distribution
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert backend == [f"setuptools=={lock('build')['setuptools']}"]


@pytest.mark.parametrize(
    ("target", "extras"), [("cpu", ("train", "tracking")), ("gpu", ("train", "tracking", "gpu"))]
)
def test_a_target_has_all_that_the_project_needs_and_nothing_twice(
    target: str, extras: tuple[str, ...]
) -> None:
    """The closure of the requirements, as the installed distributions and CUDA's wheels declare them."""
    torch, common = lock(f"torch-{target}"), lock("")
    assert not set(torch) & set(common)
    locked = {**torch, **common}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        one for extra in extras for one in project["optional-dependencies"][extra]
    ]
    todo, seen = [(Requirement(one), "") for one in wanted], set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement} is in no lock of the {target} target"
        assert requirement.specifier.contains(locked[name], prereleases=True), requirement
        for inner in {"", *requirement.extras}:
            if (name, inner) not in seen:
                seen.add((name, inner))
                todo += [(Requirement(one), inner) for one in needs(name, target)]
    assert set(locked) == {name for name, _ in seen}


def needs(distribution: str, target: str) -> list[str]:
    if target == "gpu" and distribution in (of_cuda := lock("torch-gpu")):
        return REQUIRES[f"{distribution}=={of_cuda[distribution]}"]
    return importlib.metadata.requires(distribution) or []


def test_the_requirements_of_cuda_are_of_the_versions_that_are_locked() -> None:
    assert set(REQUIRES) == {f"{name}=={version}" for name, version in lock("torch-gpu").items()}


def test_the_targets_differ_by_torch_and_cuda_only() -> None:
    cpu, gpu = lock("torch-cpu"), lock("torch-gpu")
    assert {name for name in gpu if name not in cpu and not name.startswith(CUDA)} == {"torchvision"}
    assert {name for name in cpu if gpu.get(name) != cpu[name]} == {"torch"}
    assert cpu["torch"] == gpu["torch"] + "+cpu"


def test_bitsandbytes_is_kept_for_torchs_cuda() -> None:
    major, minor = lock("torch-gpu")["cuda-toolkit"].split(".")[:2]
    assert f"'*_cuda{major}{minor}.so'" in (DOCKER / "layer.sh").read_text()
    files = importlib.metadata.files("bitsandbytes") or []
    assert f"libbitsandbytes_cuda{major}{minor}.so" in {path.name for path in files}


# --- the Dockerfile ---


def steps() -> list[str]:
    """Its instructions, continued lines joined."""
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_layers_that_change_rarely_come_first() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    copied = re.findall(r"^COPY --from=build /layers/(\w+) /$", final, re.MULTILINE)
    assert copied == ["torch", "ecosystem", "still", "code"]
    assert not re.search(r"^(RUN|ADD)\b", final, re.MULTILINE)
    # What differs with every commit comes after the last layer.
    assert final.index("ARG REVISION") > final.index("/layers/code")
    # And in the build our files come after the libraries.
    assert DOCKERFILE.index("COPY runner") > DOCKERFILE.index("layer.sh ecosystem")


def test_the_targets_differ_by_packages_and_wheels_only() -> None:
    told = [step for step in steps() if "TARGET" in step and not step.startswith("ARG ")]
    assert [step.split()[:2] for step in told] == [
        ["COPY", "docker/packages-${TARGET}.txt"],
        ["COPY", "docker/requirements-torch-${TARGET}.txt"],
        ["RUN", "--mount=type=secret,id=pip.conf"],
    ]
    assert "TORCH_CPU_LINKS" in told[2]
    cpu, gpu = ((DOCKER / f"packages-{target}.txt").read_text().split() for target in ("cpu", "gpu"))
    # Triton builds the launcher of a kernel with a C compiler, libc's and Python's headers.
    assert set(gpu) - set(cpu) == {"gcc", "libc6-dev", "libpython3-dev"}
    assert set(cpu) < set(gpu)


def test_no_step_takes_a_secret_but_by_mount() -> None:
    for step in steps():
        assert not re.match(r"(ARG|ENV|LABEL) .*(TOKEN|PASSWORD|SECRET|KEY)", step), step
        assert not re.search(r"https?://[^/ ]*@", step), step
    assert DOCKERFILE.count("--mount=type=secret,id=pip.conf") == DOCKERFILE.count("--require-hashes")


def test_every_install_is_by_hash_or_of_our_wheel() -> None:
    installs = [step for step in steps() if re.search(r"pip install|layer\.sh \w+ ", step)]
    assert len(installs) == 3
    assert all("--require-hashes" in step for step in installs)


def test_the_context_has_only_what_is_copied() -> None:
    lines = [
        line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert lines[0] == "*"
    named = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for step in steps()
        if step.startswith("COPY ") and "--from" not in step
        for word in step.split()[1:-1]
    }
    assert {word.split("/")[0] for word in copied} == named


def test_python_is_named_once_and_the_same() -> None:
    (version,) = set(re.findall(r"python(3\.\d+)", "".join(path.read_text() for path in DOCKER.glob("*.sh"))))
    assert f"PYTHON = ({version.replace('.', ', ')})" in (DOCKER / "lock.py").read_text()
    assert "bookworm" in steps()[0]


# --- make's targets ---


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shutil.copytree(DOCKER, tmp_path / "docker")
    (tmp_path / "bin").mkdir()
    return tmp_path


def stub(recipe: Path, name: str, script: str) -> None:
    program = recipe / "bin" / name
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)


def ran(recipe: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{recipe / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        [recipe / "docker" / script], env={"PATH": path, **environment}, capture_output=True, text=True
    )


def test_pin_bases_writes_the_registrys_digest(recipe: Path) -> None:
    stub(recipe, "skopeo", 'echo "$3" | grep -q ^docker://docker.io/ && printf index')
    digest = "sha256:1bc04b5291c26a46d918139138b992d2de976d6851d0893b0476b85bfbdfc6e6"
    for _ in range(2):  # a pinned one is renewed
        assert ran(recipe, "pin-bases.sh").returncode == 0
        first = re.search(r"^ARG BASE=(.*)$", (recipe / "docker" / "Dockerfile").read_text(), re.MULTILINE)
        assert first is not None
        assert first[1] == f"docker.io/library/debian:bookworm-slim@{digest}"


@pytest.mark.parametrize("script", ["exit 1", "printf part; exit 1"])
def test_pin_bases_changes_nothing_without_a_registry(recipe: Path, script: str) -> None:
    stub(recipe, "skopeo", script)
    done = ran(recipe, "pin-bases.sh")
    assert done.returncode == 69
    assert "stays as it is" in done.stderr
    assert (recipe / "docker" / "Dockerfile").read_text() == DOCKERFILE


def test_the_builder_is_the_first_that_answers(recipe: Path) -> None:
    stub(recipe, "docker", "exit 1")
    stub(recipe, "podman", 'test "$1" = info')
    assert ran(recipe, "builder.sh").stdout == "podman\n"
    assert ran(recipe, "builder.sh", BUILDER="docker").returncode == 69
    stub(recipe, "podman", "exit 1")
    done = ran(recipe, "builder.sh")
    assert done.returncode == 69
    assert "neither docker nor podman answers" in done.stderr


def test_an_unknown_target_is_a_usage_error(recipe: Path) -> None:
    done = ran(recipe, "build.sh", TARGET="tpu")
    assert (done.returncode, done.stderr) == (64, "TARGET is cpu or gpu, not tpu\n")
