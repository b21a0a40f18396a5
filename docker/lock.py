"""Write the requirements of the image again: what pip resolves today under constraints.txt, with hashes.

    .venv/bin/python docker/lock.py

Three files, one for each layer that changes at its own pace, one for the tools of the build stage, and one
for tests:

    requirements-torch-cpu.txt    torch without CUDA, and what only torch needs
    requirements-torch-gpu.txt    torch and torchvision with CUDA, Triton and NVIDIA's libraries
    requirements.txt              everything else; the same for both targets
    requirements-build.txt        setuptools, and the writer of the SBOM; nothing of it is in the image
    tests/data/cuda-requires.json what torch with CUDA and its libraries require, as their wheels say

Needs the image's Python and platform, because pip resolves for those that run it; nothing is downloaded but
metadata (and a source archive or two). The index is PyPI, whatever this machine's pip is configured for: its
`torch` is the CUDA build. The CPU build is looked for under TORCH_CPU_LINKS, a page or folder of wheels.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHON = (3, 11)
"""Of docker/Dockerfile's base, Debian 12."""

PLATFORM = ("Linux", "x86_64")
LINKS = "https://download.pytorch.org/whl/cpu/torch/"
BUILD = ("setuptools", "cyclonedx-bom")

CUDA_REQUIRES = ROOT / "tests" / "data" / "cuda-requires.json"

Lines = dict[str, str]
"""Of each distribution by its normalized name, the line of a requirements file."""


def main() -> int:
    if sys.version_info[:2] != PYTHON or (platform.system(), platform.machine()) != PLATFORM:
        print(
            f"needs Python {'.'.join(map(str, PYTHON))} on {' '.join(PLATFORM)}, the image's", file=sys.stderr
        )
        return 69
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    light, train, gpu = project["dependencies"], [*extras["train"], *extras["tracking"]], extras["gpu"]
    links = ["--find-links", os.environ.get("TORCH_CPU_LINKS", LINKS)]

    everything = lines(resolved([*light, *train, *gpu]))
    with_cuda = resolved([one for one in (*train, *gpu) if one.startswith("torch")])
    torch = lines(with_cuda)
    cpu = lines(resolved([*light, *train], *links))
    torch_cpu = lines(resolved([one for one in train if one.startswith("torch")], *links))
    common = {
        one: line for one, line in everything.items() if one not in torch or one in set(cpu) - set(torch_cpu)
    }
    assert common == {one: line for one, line in cpu.items() if one not in torch_cpu}, "the targets differ"

    write("requirements-torch-cpu.txt", torch_cpu)
    of_cuda = {one: line for one, line in torch.items() if one not in common}
    write("requirements-torch-gpu.txt", of_cuda)
    write("requirements.txt", common)
    write("requirements-build.txt", lines(resolved(list(BUILD))))
    requires = {
        of_cuda[name(one)].partition(" ")[0]: one["metadata"].get("requires_dist", [])
        for one in with_cuda
        if name(one) in of_cuda
    }
    CUDA_REQUIRES.write_text(json.dumps(requires, indent=1, sort_keys=True) + "\n")
    print(f"{CUDA_REQUIRES.relative_to(ROOT)}: {len(requires)}")
    return 0


def resolved(requirements: list[str], *options: str) -> list[dict[str, Any]]:
    """What pip would install into an empty environment: entries of its report."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--index-url", "https://pypi.org/simple", *options]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--report", "-", *requirements]
    # Who resolves must not matter: no configuration file, no other index.
    other = ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")
    environ = {key: value for key, value in os.environ.items() if key not in other}
    environ["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return found


def lines(installs: list[dict[str, Any]]) -> Lines:
    """Of entries of pip's report, by name: version and SHA-256."""
    found = {}
    for one in installs:
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        found[name(one)] = f"{name(one)}=={one['metadata']['version']} --hash=sha256:{digest}"
    return dict(sorted(found.items()))


def name(install: dict[str, Any]) -> str:
    """Normalized."""
    return re.sub(r"[-_.]+", "-", install["metadata"]["name"]).lower()


def write(file: str, content: Lines) -> None:
    header = "# Written by docker/lock.py (make image-lock) from pyproject.toml and constraints.txt.\n"
    (HERE / file).write_text(header + "".join(f"{line}\n" for line in content.values()))
    print(f"docker/{file}: {len(content)}")


if __name__ == "__main__":
    sys.exit(main())
