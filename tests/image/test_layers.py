"""What lies in the image: its layers, their sizes, what a changed line costs, and what must not be there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.image.containers import ROOT, SECRET, builder

IGNORED = shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__", ".*_cache")
MIB = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One layer of an image."""

    digest: str
    """SHA-256 of its archive."""
    size: int
    """Bytes of the archive."""
    compressed: int
    """The same through gzip, as a registry stores it and a node pulls it."""
    made_by: str
    names: tuple[str, ...]
    secret: bool
    """Whether the planted secret stands in it."""


@dataclass(frozen=True)
class Image:
    config: dict[str, Any]
    layers: tuple[Layer, ...]
    text: str
    """Configuration and history."""


def looked_at(archive: tarfile.TarFile, name: str, made_by: str) -> Layer:
    member = archive.extractfile(name)
    assert member is not None
    digest, gzip, compressed, size, secret, tail = hashlib.sha256(), zlib.compressobj(6), 0, 0, False, b""
    while chunk := member.read(4 * MIB):
        digest.update(chunk)
        compressed += len(gzip.compress(chunk))
        size += len(chunk)
        secret = secret or SECRET.encode() in tail + chunk
        tail = chunk[-len(SECRET) :]
    member.seek(0)
    with tarfile.open(fileobj=member) as layer:
        names = tuple(one.name for one in layer)
    return Layer(digest.hexdigest(), size, compressed + len(gzip.flush()), made_by, names, secret)


def image(tag: str, folder: Path) -> Image:
    """Read an image by saving it."""
    saved = folder / "image.tar"
    options = ("--format", "docker-archive") if os.environ["BUILDER"].endswith("podman") else ()
    builder("save", *options, "--output", str(saved), tag)
    with tarfile.open(saved) as archive:
        (manifest,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        text = archive.extractfile(manifest["Config"]).read().decode()  # type: ignore[union-attr]
    config = json.loads(text)
    steps = [one.get("created_by", "") for one in config["history"] if not one.get("empty_layer")]

    def one(name: str, made_by: str) -> Layer:
        with tarfile.open(saved) as archive:
            return looked_at(archive, name, made_by)

    with ThreadPoolExecutor(2) as pool:
        layers = tuple(pool.map(one, manifest["Layers"], steps))
    saved.unlink()
    return Image(config, layers, text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Image:
    found = image(os.environ["IMAGE_UNDER_TEST"], tmp_path_factory.mktemp("built"))
    print(f"\n{'MiB':>9} {'gzip':>9}  layer")
    for layer in found.layers:
        print(f"{layer.size / MIB:9.1f} {layer.compressed / MIB:9.1f}  {what(layer)}")
    sizes = sum(layer.size for layer in found.layers), sum(layer.compressed for layer in found.layers)
    print(f"{sizes[0] / MIB:9.1f} {sizes[1] / MIB:9.1f}  {os.environ['IMAGE_UNDER_TEST']}")
    return found


def what(layer: Layer) -> str:
    """Its content in a word or two."""
    signs = {
        "torch": "/site-packages/torch/__init__.py",
        "ecosystem": "/site-packages/transformers/__init__.py",
        "what hardly changes": "/smolvlm-tiny/model.safetensors",
        "code": "/site-packages/runner/__init__.py",
        "Debian's packages": "usr/bin/python3.11",
        "base": "usr/bin/dpkg",
    }
    for word, sign in signs.items():
        if any(("/" + name).endswith("/" + sign.lstrip("/")) for name in layer.names):
            return word
    return layer.made_by[:60]


def build(folder: Path, tag: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build from a folder in the environment that make had, before tests/conftest.py closed the way out."""
    read = Path("/proc/self/environ").read_bytes().split(b"\0")
    own = dict(one.decode().split("=", 1) for one in read if one)
    return subprocess.run(
        [folder / "docker" / "build.sh"],
        env={**own, **environment, "IMAGE": tag},
        capture_output=True,
        text=True,
    )


def test_torch_then_the_ecosystem_then_our_code(built: Image) -> None:
    words = [what(layer) for layer in built.layers]
    assert [word for word in words if word in ("torch", "ecosystem", "what hardly changes")] == words[-4:-1]
    assert words[-1] == "code"
    assert built.layers[-1].compressed < 1.5 * MIB


def test_a_changed_line_rebuilds_the_last_layer_only(built: Image, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=IGNORED)
    code = copy / "runner" / "launch.py"
    code.write_text(code.read_text() + "# One more line.\n")
    tag = os.environ["IMAGE_UNDER_TEST"] + "-changed"
    try:
        done = build(copy, tag)
        assert done.returncode == 0, done.stdout + done.stderr
        changed = image(tag, tmp_path)
    finally:
        builder("rmi", tag, check=False)
    before, after = ([layer.digest for layer in one.layers] for one in (built, changed))
    assert after[:-1] == before[:-1]
    assert after[-1] != before[-1]
    print(f"\na changed line of runner/: {changed.layers[-1].compressed / 1024:.0f} KiB to pull")


def test_nobodys_secret_and_no_pip_configuration_is_in_it(built: Image, tmp_path: Path) -> None:
    """Built with a secret in the environment, in pip's own variables too."""
    tag = os.environ["IMAGE_UNDER_TEST"] + "-secret"
    planted = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "PIP_TIMEOUT": "60", "PLANTED": SECRET}
    try:
        done = build(ROOT, tag, **planted)
        assert done.returncode == 0, done.stdout + done.stderr
        found = image(tag, tmp_path)
    finally:
        builder("rmi", tag, check=False)
    assert SECRET not in done.stdout + done.stderr
    assert SECRET not in found.text
    assert not any(layer.secret for layer in found.layers)
    names = [name for layer in found.layers for name in layer.names]
    assert not [name for name in names if name.endswith("pip.conf") or name.startswith("run/secrets/")]


def test_no_tool_that_no_run_needs(built: Image) -> None:
    names = {name for layer in built.layers for name in layer.names}
    programs = {Path(name).name for name in names if re.search(r"(^|/)s?bin/", name)}
    assert not programs & {
        "gcc",
        "cc",
        "tcc",
        "ld",
        "pip",
        "pip3",
        "curl",
        "wget",
        "git",
        "ssh",
        "sudo",
        "make",
        "vim",
    }
    assert not [name for name in names if re.search(r"site-packages/(pip|torch/test|[^/]*/tests)/", name)]
    assert not [
        name
        for name in names
        if name.startswith(("root/.cache", "var/lib/apt/lists/deb", "var/cache/apt/arch"))
    ]


def test_bytecode_is_there_for_a_root_that_nobody_writes(built: Image) -> None:
    names = {name for layer in built.layers for name in layer.names}
    sources = [
        name for name in names if name.startswith("opt/venv/") and "/runner/" in name and name.endswith(".py")
    ]
    assert sources
    for source in sources:
        folder, _, name = source.rpartition("/")
        assert f"{folder}/__pycache__/{name[:-3]}.cpython-311.pyc" in names


def test_labels_environment_and_entry(built: Image) -> None:
    config = built.config["config"]
    labels = {
        name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()
    }
    assert {"title", "licenses", "source", "version", "revision", "created"} <= set(labels)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["runner"]
    environment = dict(one.split("=", 1) for one in config["Env"])
    caches = {name for name, value in environment.items() if value.startswith("/scratch/")}
    assert {
        *("HOME", "RUNNER_CACHE", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
        *("CUDA_CACHE_PATH", "MPLCONFIGDIR", "TORCH_EXTENSIONS_DIR"),
    } == caches


def test_the_sbom_lists_every_distribution_of_the_locks_and_debians() -> None:
    sbom = json.loads((ROOT / "build" / "sbom-cpu.cdx.json").read_text())
    components = {
        (one["name"].lower().replace("_", "-").replace(".", "-"), one["version"])
        for one in sbom["components"]
    }
    for name in ("requirements.txt", "requirements-torch-cpu.txt"):
        for line in (ROOT / "docker" / name).read_text().splitlines():
            if not line.startswith("#"):
                distribution, version = line.split(" ")[0].split("==")
                assert (distribution, version) in components
    assert any(one.get("purl", "").startswith("pkg:deb/debian/libc6@") for one in sbom["components"])
    assert sbom["metadata"]["component"]["name"] == "vlm-runner"
