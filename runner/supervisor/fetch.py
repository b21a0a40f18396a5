"""Brings what a job names to this machine: `python -m runner.supervisor.fetch REQUEST ANSWER`.

    demo:charts                         built by `runner.demo` into the cache
    ./data, /data/x, ~/x, rows.jsonl    must be there
    organisation/name                   from the hub (`runner.supervisor.hub`), at one commit
    lora.init_from                      a folder on this machine, hashed whole

It is a process of its own, so that the supervisor stays small and Ctrl-C in a long download is nothing
special: what was downloaded stays in the hub's cache. The request is the job and the commits that earlier
attempts used; the answer is where everything lies, the commits, and a fingerprint of what is local.
Rows are not read here; that a dataset means what the job says is checked by the trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runner import demo
from runner.checkpoint.files import verify
from runner.durable import disk, write_text
from runner.errors import AccessDenied, DataError, JobError, RunnerError, StorageError
from runner.manifest import Job, looks_local
from runner.plan import Fetched
from runner.supervisor import hub
from runner.supervisor.hub import Kind, Say
from runner.supervisor.weights import Weights, check_model, find_weights

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_ENDS = 1 << 16
"""Bytes read at both ends of a local file for its fingerprint."""


class Request(BaseModel):
    """What to fetch."""

    model_config = ConfigDict(frozen=True)

    job: Job
    train: bool
    """Whether `datasets.train` is needed."""
    pins: dict[str, str]
    """`key(...)` -> commit that the run began with."""
    weights: bool = True
    """Whether the model's weights are needed; a plan does without those of the hub."""


class Answer(BaseModel):
    """Where it lies."""

    model_config = ConfigDict(frozen=True)

    fetched: Fetched
    pins: dict[str, str]
    """`key(...)` -> commit, of everything from the hub."""
    fingerprints: dict[str, str]
    """Local path, or demo name -> hash of what is there now."""
    weights: Weights | None = None
    """Of a request without them."""


class _Refusal(BaseModel):
    exit_code: int
    error: str


_REFUSALS: dict[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (RunnerError, DataError, StorageError, AccessDenied)
}


def key(kind: Kind, path: str, revision: str) -> str:
    """Name of one revision of a hub repository, as `run.json` keeps it."""
    return f"{kind} {path}@{revision}"


def read_answer(path: Path) -> Answer | None:
    """What the process left; None if it died before it could.

    Raises:
        DataError, StorageError, AccessDenied: what it refused.
    """
    if not path.exists():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    if "error" in document:
        refusal = _Refusal.model_validate(document)
        raise _REFUSALS[refusal.exit_code](refusal.error)
    return Answer.model_validate(document)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """`RUNNER_CACHE`, else `vlm-runner` in the user's cache folder."""
    if named := environ.get("RUNNER_CACHE"):
        return Path(named).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vlm-runner"


def place(kind: Kind, path: str) -> Literal["demo", "local", "hub"]:
    """Where a `path` or `name_or_path` points.

        demo:charts                                           demo
        /data/x  ./x  ../x  ~/x                               local
        rows.jsonl  tables/rows.csv   (datasets)              local
        anything that exists from the current folder          local
        organisation/name   name                              hub
        a/b/c   "two words"   C:\\x                            DataError: neither

    Raises:
        DataError: it cannot be a hub id, and nothing is there.
    """
    if path.startswith(demo.PREFIX):
        return "demo"
    if looks_local(path, kind == "dataset") or Path(path).exists():
        return "local"
    if _HUB_ID.fullmatch(path):
        return "hub"
    raise DataError(
        f"find {kind} {path!r}: {Path(path).absolute()} does not exist, and a hub id is organisation/name; "
        "remedy: correct the path (it counts from the current folder) or the id"
    )


def fetch(request: Request, environ: Mapping[str, str], say: Say) -> Answer:
    """Fetch everything, in this process.

    Raises:
        DataError: something is not there, or not what it must be.
        AccessDenied: the hub wants credentials or consent.
        StorageError: the network or the disk.
    """
    job = request.job
    cache = cache_folder(environ)
    pins: dict[str, str] = {}
    prints: dict[str, str] = {}
    revisions: dict[str, str] = {}

    def one(kind: Kind, path: str, revision: str) -> str:
        where = place(kind, path)
        if where == "hub":
            name = key(kind, path, revision)
            say({"event": "message", "text": f"fetching {kind} {path} ({revision})"})
            folder = hub.snapshot(kind, path, request.pins.get(name, revision), say, request.weights)
            pins[name] = revisions[path] = folder.name
        elif where == "demo":
            folder = demo.resolve_model(path) if kind == "model" else demo.resolve_dataset(path, cache)
            # A dataset's folder is named for its version; its files hold times and are no identity.
            prints[path] = fingerprint(folder) if kind == "model" else folder.name
        else:
            folder = _local(kind, path)
            prints[path] = fingerprint(folder)
        if kind == "model":
            check_model(path, folder, weights=request.weights or where != "hub")
        return str(folder)

    start = None  # first, because it may be missing, and the rest may take an hour
    if request.train and job.lora is not None and (init_from := job.lora.get("init_from")) is not None:
        start = _start(init_from)
        # Whole: it is small, and one changed number makes another run.
        prints[init_from] = _hashed(start)
    model = one("model", job.model.name_or_path, job.model.revision)
    train = [one("dataset", source.path, source.revision) for source in job.datasets.train if request.train]
    held_out = [one("dataset", source.path, source.revision) for source in job.datasets.eval]
    fetched = Fetched(
        model=model,
        train=train,
        eval=held_out,
        init_from=None if start is None else str(start),
        revisions=revisions,
    )
    weights = None if request.weights else find_weights(job.model.name_or_path, Path(model))
    return Answer(fetched=fetched, pins=pins, fingerprints=prints, weights=weights)


def fingerprint(path: Path) -> str:
    """Hash of a local file or folder: names and sizes, and both ends of all files that are no pictures.

    Cheap on gigabytes, and sees a dataset or a model that was written again. A change in the middle of a
    file that keeps its size is not seen; neither is one inside a picture.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
            if file.suffix.lower() not in _PICTURES:
                with file.open("rb") as content:
                    digest.update(content.read(_ENDS))
                    content.seek(max(0, size - _ENDS))
                    digest.update(content.read(_ENDS))
    return digest.hexdigest()


def _start(given: str) -> Path:
    """The folder that `lora.init_from` names: an adapter's, or a checkpoint's, which is verified.

    Raises:
        DataError: there is none, or it holds neither.
    """
    path = Path(given.removeprefix("file://")).expanduser().absolute()
    if (path / "parameters.safetensors").is_file():
        try:
            verify(path)
        except (DataError, JobError) as error:
            raise DataError(
                f"use lora.init_from {given}: {error}; remedy: name another checkpoint of that run"
            ) from error
        return path
    if not (path / "adapter_config.json").is_file():
        raise DataError(
            f"find lora.init_from {given}: {path} holds neither adapter_config.json nor "
            "parameters.safetensors; remedy: name an adapter's folder, as runs/<name>/adapter, or what "
            "runner checkpoints pull made"
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise DataError(
            f"find lora.init_from {given}: {path} has no adapter_model.safetensors; pickled weights are not "
            "loaded, because they can run code; remedy: save the adapter with safetensors"
        )
    return path


def _hashed(folder: Path) -> str:
    """SHA-256 over names and contents of the files that decide where training starts."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            with file.open("rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _local(kind: Kind, path: str) -> Path:
    full = Path(path).expanduser().absolute()
    if not full.exists():
        raise DataError(
            f"find {kind} {path}: {full} does not exist; remedy: correct the path; one that is not absolute "
            f"counts from the current folder, {Path.cwd()}"
        )
    if kind == "dataset" and full.is_dir() and not any(full.iterdir()):
        raise DataError(f"find dataset {path}: {full} is empty; remedy: name the folder that holds the data")
    return full


class _Say:
    """Sends events to the supervisor; nowhere when the program is run by hand."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        fd = environ.get("RUNNER_EVENTS_FD")
        self._fd = None if fd is None else int(fd)

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self._fd is not None:
            # One write below PIPE_BUF: the hub's download threads cannot mix their lines.
            os.write(self._fd, json.dumps(event).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Read the request, write the answer. Returns the exit code that the answer names."""
    request, answer = map(Path, arguments)
    say = _Say(os.environ)
    with disk("read the fetch request", request):
        document = request.read_text(encoding="utf-8")
    try:
        result = fetch(Request.model_validate_json(document), os.environ, say)
    except RunnerError as error:
        write_text(answer, _Refusal(exit_code=error.exit_code, error=str(error)).model_dump_json())
        return error.exit_code
    write_text(answer, result.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
