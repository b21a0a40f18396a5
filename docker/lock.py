"""Write the requirements of the image again: what pip resolves today under constraints.txt, with hashes.

    .venv/bin/python docker/lock.py

Three files, one for each layer that changes at its own pace, and one for the tools of the build stage:

    requirements-torch-cpu.txt    torch without CUDA, and what only torch needs
    requirements-torch-gpu.txt    torch and torchvision with CUDA, Triton and NVIDIA's libraries
    requirements.txt              everything else; the same for both targets
    requirements-build.txt        setuptools, and the writer of the SBOM; nothing of it is in the image

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

    everything = resolved([*light, *train, *gpu])
    torch = resolved([one for one in (*train, *gpu) if one.startswith("torch")])
    cpu = resolved([*light, *train], *links)
    torch_cpu = resolved([one for one in train if one.startswith("torch")], *links)
    common = {
        name: line
        for name, line in everything.items()
        if name not in torch or name in set(cpu) - set(torch_cpu)
    }
    assert common == {name: line for name, line in cpu.items() if name not in torch_cpu}, "the targets differ"

    write("requirements-torch-cpu.txt", torch_cpu)
    write("requirements-torch-gpu.txt", {name: line for name, line in torch.items() if name not in common})
    write("requirements.txt", common)
    write("requirements-build.txt", resolved(list(BUILD)))
    return 0


def resolved(requirements: list[str], *options: str) -> Lines:
    """What pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--index-url", "https://pypi.org/simple", *options]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--report", "-", *requirements]
    # Who resolves must not matter: no configuration file, no other index.
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")
    }
    environ["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    return dict(sorted(map(line, json.loads(done.stdout)["install"])))


def line(install: dict[str, Any]) -> tuple[str, str]:
    """One entry of pip's report: normalized name, line with version and SHA-256."""
    name = re.sub(r"[-_.]+", "-", install["metadata"]["name"]).lower()
    digest = install["download_info"]["archive_info"]["hashes"]["sha256"]
    return name, f"{name}=={install['metadata']['version']} --hash=sha256:{digest}"


def write(name: str, lines: Lines) -> None:
    header = "# Written by docker/lock.py (make image-lock) from pyproject.toml and constraints.txt.\n"
    (HERE / name).write_text(header + "".join(f"{line}\n" for line in lines.values()))
    print(f"docker/{name}: {len(lines)}")


if __name__ == "__main__":
    sys.exit(main())
