"""Fetching: what a path means, what is missing is named, and a hub that says every kind of no."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from runner.checkpoint.files import seal
from runner.errors import AccessDenied, DataError, StorageError
from runner.manifest import Job
from runner.supervisor import fetch
from runner.supervisor.fetch import Answer, Request, cache_folder, fingerprint, key, place, read_answer
from runner.supervisor.hub import Kind
from runner.supervisor.weights import INDEX, Weights, find_weights

OLD, NEW = "a" * 40, "b" * 40


def job(model: str, data: str) -> Job:
    source = {"path": data, "format": "vqa"}
    return Job.model_validate(
        {"name": "test", "model": {"name_or_path": model}, "datasets": {"train": [source], "eval": [source]}}
    )


def local_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


# --- what a path means ---


@pytest.mark.parametrize(
    ("kind", "path", "where"),
    [
        ("model", "demo:smolvlm-tiny", "demo"),
        ("dataset", "/data/x", "local"),
        ("dataset", "./x", "local"),
        ("dataset", "../x", "local"),
        ("dataset", "~/x", "local"),
        ("dataset", "rows.jsonl", "local"),
        ("dataset", "tables/rows.csv", "local"),
        ("dataset", "here", "local"),
        ("model", "HuggingFaceTB/SmolVLM-Instruct", "hub"),
        ("model", "gpt2", "hub"),
        ("model", "organisation/name.json", "hub"),
    ],
)
def test_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, path: str, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert place(kind, path) == where


@pytest.mark.parametrize("path", ["a/b/c", "two words", "C:\\data", "data/train/"])
def test_place_answers_what_is_neither_id_nor_path(path: str) -> None:
    with pytest.raises(DataError, match=r"does not exist, and a hub id is organisation/name; remedy"):
        place("dataset", path)


def test_cache_folder_follows_its_variables() -> None:
    assert cache_folder({"RUNNER_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/vlm-runner")
    assert cache_folder({}) == Path.home() / ".cache" / "vlm-runner"


# --- what is local ---


def test_local_sources_are_found_and_fingerprinted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    wanted = job("./model", "rows.jsonl")
    answer = fetch.fetch(Request(job=wanted, train=True, pins={}), {}, lambda event: None)
    assert answer.fetched.model == str(tmp_path / "model")
    assert answer.fetched.train == answer.fetched.eval == [str(tmp_path / "rows.jsonl")]
    assert answer.fetched.revisions == answer.pins == {}
    assert set(answer.fingerprints) == {"./model", "rows.jsonl"}
    evaluating = fetch.fetch(Request(job=wanted, train=False, pins={}), {}, lambda event: None)
    assert evaluating.fetched.train == []


def test_fingerprint_sees_names_sizes_and_content_of_tables_and_weights(tmp_path: Path) -> None:
    folder = local_model(tmp_path / "model")
    (folder / "a.png").write_bytes(b"picture")
    seen = {fingerprint(folder)}
    for change in (
        lambda: (folder / "model.safetensors").write_bytes(b"weightz"),
        lambda: (folder / "a.png").write_bytes(b"longer picture"),
        lambda: (folder / "a.png").rename(folder / "b.png"),
        lambda: (folder / "big.parquet").write_bytes(bytes(300_000)),
        lambda: (folder / "big.parquet").write_bytes(bytes(299_999) + b"1"),
    ):
        change()
        assert fingerprint(folder) not in seen
        seen.add(fingerprint(folder))
    os.utime(folder / "model.safetensors", (1, 1))
    assert fingerprint(folder) in seen


def test_what_is_missing_or_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = local_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    cases = [
        (job("./model", "./nowhere"), rf"find dataset ./nowhere: {tmp_path}/nowhere does not exist"),
        (job("./model", "./empty"), r"empty is empty"),
        (job("./empty", "rows.jsonl"), r"has no config.json"),
        (job("demo:gpt5", "rows.jsonl"), r"no such embedded model"),
    ]
    for wanted, message in cases:
        with pytest.raises(DataError, match=message):
            fetch.fetch(Request(job=wanted, train=True, pins={}), {}, lambda event: None)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"has no .safetensors; pickled weights are not loaded"):
        fetch.fetch(Request(job=job("./model", "rows.jsonl"), train=True, pins={}), {}, lambda event: None)


def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A request for a job that starts from `start` in the current folder."""
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text("{}\n")
    local_model(folder / "model")
    (folder / "start").mkdir()
    wanted = job("./model", "rows.jsonl").model_copy(update={"lora": {"init_from": "start"}})
    return Request(job=wanted, train=True, pins={})


def test_an_adapter_to_start_from_is_known_by_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = started(tmp_path, monkeypatch)
    (tmp_path / "start" / "adapter_config.json").write_text("{}")
    weights = tmp_path / "start" / "adapter_model.safetensors"
    prints = set()
    for content in (bytes(300_000), bytes(150_000) + b"1" + bytes(149_999)):
        weights.write_bytes(content)
        answer = fetch.fetch(request, {}, lambda event: None)
        assert answer.fetched.init_from == str(tmp_path / "start")
        prints.add(answer.fingerprints["start"])
    assert len(prints) == 2
    (tmp_path / "model" / "config.json").unlink()  # it is looked at before anything is downloaded
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DataError, match=r"init_from start: .* pickled weights are not loaded"):
        fetch.fetch(request, {}, lambda event: None)


def test_a_checkpoint_to_start_from_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = started(tmp_path, monkeypatch)
    parameters = tmp_path / "start" / "parameters.safetensors"
    parameters.write_bytes(b"values")
    seal(tmp_path / "start", id="start", step=1, parent=None, extra={})
    answer = fetch.fetch(request, {}, lambda event: None)
    assert answer.fetched.init_from == str(tmp_path / "start")
    parameters.write_bytes(b"valuez")
    with pytest.raises(DataError, match=r"init_from start: checkpoint start: parameters.safetensors has SHA"):
        fetch.fetch(request, {}, lambda event: None)


def test_demo_charts_are_known_by_the_version_of_their_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "cache" / "demo" / "charts-v7"
    monkeypatch.setattr(fetch.demo, "resolve_dataset", lambda name, cache: cache / "demo" / "charts-v7")
    request = Request(job=job(str(local_model(tmp_path / "model")), "demo:charts"), train=True, pins={})
    answer = fetch.fetch(request, {"RUNNER_CACHE": str(tmp_path / "cache")}, lambda event: None)
    assert answer.fetched.train == [str(built)]
    assert answer.fingerprints["demo:charts"] == "charts-v7"


# --- the hub ---


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as `snapshot_download` uses; the repository's name says how it behaves."""

    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
        "data/train.parquet": b"rows",
    }
    head: ClassVar[str] = OLD

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path, _, _ = self.path.partition("?")
        for name, status, code in (
            ("missing", 404, "RepoNotFound"),
            ("private", 401, "RepoNotFound"),
            ("gated", 403, "GatedRepo"),
            ("forbidden", 403, ""),
            ("broken", 500, ""),
        ):
            if f"org/{name}" in path:
                return self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
        if path.endswith("/revision/nowhere"):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "/revision/" in path:
            listed = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            siblings = listed if "blobs" in self.path else []
            found = {"id": "org/good", "sha": self.head, "siblings": siblings}
            return self.reply(200, json.dumps(found).encode())
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in self.files.items()
            ]
            return self.reply(200, json.dumps(tree).encode())
        commit, _, name = path.partition("/resolve/")[2].partition("/")
        data = self.files[name] + commit[:1].encode()
        return self.reply(200, data, {"X-Repo-Commit": commit, "ETag": f'"{name}{commit[:1]}"'})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that sees the fake hub, and nothing else."""
    Hub.files["config.json"], Hub.head = b"{} ", OLD
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    server.shutdown()
    thread.join()
    server.server_close()


def run_fetch(folder: Path, request: Request, environ: dict[str, str]) -> tuple[int, Answer | None, str]:
    asked, answer = folder / "request.json", folder / "answer.json"
    asked.write_text(request.model_dump_json())
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "runner.supervisor.fetch", str(asked), str(answer)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode, read_answer(answer), done.stderr


def test_hub_gives_folders_and_commits_and_a_pin_outlives_the_branch(
    tmp_path: Path, hub: dict[str, str]
) -> None:
    wanted = job("org/good", "org/good")
    code, first, errors = run_fetch(tmp_path, Request(job=wanted, train=True, pins={}), hub)
    assert code == 0, errors
    assert first is not None
    names = {key("model", "org/good", "main"), key("dataset", "org/good", "main")}
    assert first.pins == dict.fromkeys(names, OLD)
    assert first.fetched.revisions == {"org/good": OLD}
    model = Path(first.fetched.model)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]
    assert (Path(first.fetched.train[0]) / "data" / "train.parquet").read_bytes() == b"rowsa"
    Hub.head = NEW
    code, again, errors = run_fetch(tmp_path, Request(job=wanted, train=True, pins=first.pins), hub)
    assert code == 0, errors
    assert again == first
    # Nobody answers any more: the cache has it.
    offline = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    code, cached, errors = run_fetch(tmp_path, Request(job=wanted, train=True, pins=first.pins), offline)
    assert code == 0, errors
    assert cached == first
    _, moved, _ = run_fetch(tmp_path, Request(job=wanted, train=True, pins={}), hub)
    assert moved is not None
    assert set(moved.pins.values()) == {NEW}


def test_a_plan_leaves_the_weights_at_the_hub_and_knows_their_size(
    tmp_path: Path, hub: dict[str, str]
) -> None:
    without = Request(job=job("org/good", "org/good"), train=True, pins={}, weights=False)
    code, answer, errors = run_fetch(tmp_path, without, hub)
    assert code == 0, errors
    assert answer is not None
    assert answer.weights == Weights(bytes=len(b"weights"), here=False)
    model = Path(answer.fetched.model)
    assert [path.name for path in model.iterdir()] == ["config.json"]
    # An index says it without the network, and the files say whether they are all here.
    index = {"metadata": {"total_size": 9000}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (model / INDEX).write_text(json.dumps(index))
    (model / "1.safetensors").touch()
    assert find_weights("org/good", model) == Weights(bytes=9000, here=False)
    (model / "2.safetensors").touch()
    assert find_weights("org/good", model) == Weights(bytes=9000, here=True)
    (model / INDEX).write_text("{}")
    with pytest.raises(DataError, match="is no index of weights; remedy"):
        find_weights("org/good", model)
    (model / INDEX).unlink()
    for file in model.glob("*.safetensors"):
        file.unlink()
    offline = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    code, answer, errors = run_fetch(tmp_path, without.model_copy(update={"pins": answer.pins}), offline)
    assert code == 0, errors
    assert answer is not None
    assert answer.weights == Weights(bytes=None, here=False)
    weights = Hub.files.pop("model.safetensors")  # pickles alone
    try:
        with pytest.raises(DataError, match=r"has no .safetensors; pickled weights are not loaded"):
            run_fetch(tmp_path, without, {**hub, "HF_HOME": str(tmp_path / "other")})
    finally:
        Hub.files["model.safetensors"] = weights


def test_every_kind_of_no_has_its_exit_code(tmp_path: Path, hub: dict[str, str]) -> None:
    script = """
import json, sys
from runner.supervisor import hub
from runner.errors import RunnerError
for kind, path, revision in json.loads(sys.argv[1]):
    try:
        hub.snapshot(kind, path, revision, lambda event: None)
    except RunnerError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""

    def ask(cases: list[list[str]], environ: dict[str, str]) -> list[list[str]]:
        command = [sys.executable, "-c", script, json.dumps(cases)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    expected = {
        ("model", "org/missing", "main"): (DataError, "there is no such model on the hub"),
        ("dataset", "org/private", "main"): (AccessDenied, "does not exist, or it is private"),
        ("dataset", "org/gated", "main"): (
            AccessDenied,
            "accept its conditions at https://huggingface.co/datasets/org/gated",
        ),
        ("model", "org/forbidden", "main"): (AccessDenied, "the hub answers 403"),
        ("model", "org/broken", "main"): (StorageError, "the hub answers 500"),
        ("model", "org/good", "nowhere"): (DataError, "it has no revision 'nowhere'"),
        ("model", "org/--good", "main"): (DataError, "it is no hub id"),
    }
    for (kind, message), said in zip(
        expected.values(), ask([list(case) for case in expected], hub), strict=True
    ):
        assert said[0] == kind.__name__, said
        assert message in said[1]
        assert "remedy: " in said[1]
    (said,) = ask([["model", "org/good", "main"]], {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert said[0] == "StorageError"
    assert "the hub cannot be reached" in said[1]
    (said,) = ask([["model", "org/good", "main"]], {**hub, "HF_HUB_OFFLINE": "1"})
    assert said[0] == "StorageError"
    assert "HF_HUB_OFFLINE is set" in said[1]
