"""Uploading an export: what the hub got, and every kind of no with its exit code and its remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import TOKEN, FakeHub, fake_hub

SCRIPT = """
import json, sys
from pathlib import Path
from runner.errors import RunnerError
from runner.export import hub
folder, public, repos = Path(sys.argv[1]), sys.argv[2] == "public", sys.argv[3:]
for repo in repos:
    try:
        hub.check(repo)
        print(json.dumps([0, hub.push(folder, repo, public)]))
    except RunnerError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# mine\n")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def pushed(
    hub: FakeHub,
    folder: Path,
    *repos: str,
    environ: dict[str, str] | None = None,
    public: bool = False,
) -> list[tuple[int, str]]:
    """Exit code and words of each, in one process of its own: huggingface_hub reads its settings once."""
    command = [sys.executable, "-c", SCRIPT, str(folder), "public" if public else "private", *repos]
    given = {**os.environ, "HF_HOME": str(folder.parent / "home"), **(environ or hub.environ())}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_it_is_uploaded_whole_and_for_nobody_else(hub: FakeHub, folder: Path) -> None:
    ((code, said),) = pushed(hub, folder, "me/mine")
    assert (code, said) == (0, f"{hub.endpoint}/me/mine")
    assert hub.private == {"me/mine": True}
    assert hub.files["me/mine"]["adapter_model.safetensors"] == b"weights"
    assert set(hub.files["me/mine"]) >= {"README.md", "adapter_model.safetensors"}


def test_everybody_sees_it_only_if_somebody_says_so(hub: FakeHub, folder: Path) -> None:
    pushed(hub, folder, "me/open", public=True)
    assert hub.private == {"me/open": False}
    uploaded = hub.files.pop("me/open")
    ((code, said),) = pushed(hub, folder, "me/open")
    assert code == 64 and "everybody sees it" in said and f"hf upload me/open '{folder}'" in said
    assert hub.files == {}
    ((code, _),) = pushed(hub, folder, "me/open", public=True)
    assert code == 0 and hub.files["me/open"] == uploaded


def test_every_kind_of_no(hub: FakeHub, folder: Path) -> None:
    hub.failing = {
        "/api/models/me/forbidden/preupload": 403,
        "/api/models/me/unknown/preupload": 401,
        "/api/models/me/refused/commit": 400,
        "/api/models/me/broken/commit": 500,
        "/api/models/me/cut/commit": 0,
    }
    expected = {
        "me/forbidden": (77, "the hub answers 403"),
        "me/unknown": (77, "the hub answers 401"),
        "me/refused": (65, "it is so"),
        "me/broken": (74, "the hub answers 500"),
        "me/cut": (74, "the hub cannot be reached"),
        "a/b/c": (64, "no id of the hub"),
    }
    for (repo, (code, words)), (found, said) in zip(
        expected.items(), pushed(hub, folder, *expected), strict=True
    ):
        assert found == code, said
        assert words in said and "remedy: " in said, said
        if code in (65, 74, 77):
            assert f"{folder} is whole and stays" in said and f"hf upload {repo} '{folder}'" in said
    assert hub.files == {}


def test_who_may_not_write_learns_it_before_anything_is_made(hub: FakeHub, folder: Path) -> None:
    (nobody,) = pushed(hub, folder, "me/mine", environ=hub.environ(token=None))
    assert nobody[0] == 77 and "set HF_TOKEN" in nobody[1]
    (stranger,) = pushed(hub, folder, "me/mine", environ=hub.environ(token="hf_" + "x" * 24))
    assert stranger[0] == 77 and "401" in stranger[1]
    hub.role = "read"
    (reader,) = pushed(hub, folder, "me/mine")
    assert reader[0] == 77 and "may only read" in reader[1]
    (offline,) = pushed(hub, folder, "me/mine", environ={**hub.environ(), "HF_HUB_OFFLINE": "1"})
    assert offline[0] == 74 and "HF_HUB_OFFLINE is set" in offline[1]
    assert not [line for line in hub.seen if line.startswith("POST")]
