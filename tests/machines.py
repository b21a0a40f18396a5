"""Machines, for tests of the supervisor: a job, commands on it in forked processes, and runs in a bucket.

    Bench      a job with local sources, on a machine of its own; `train` runs the real supervisor
    Command    such a command while it runs
    World      a run in a bucket behind the fault proxy, and machines that come and go

The trainer is tests/fake_rank.py: without torch, and its end says whether a step was lost or done twice. What
a test needs of these is a fixture here, a plugin of pytest's that conftest.py names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import events, launch
from runner.checkpoint import lease
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import Head, Manifest, decode
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.place import open_store
from runner.checkpoint.restore import download
from runner.checkpoint.store import BootClock, Patience, Store
from runner.errors import RunnerError
from runner.settings import resolve
from runner.supervisor import custody
from tests.fault_proxy import FaultProxy
from tests.s3_server import BUCKET, ENVIRONMENT, s3_server

RANK = Path(__file__).with_name("fake_rank.py")

_COUNT = iter(range(1_000_000))


class Command:
    """`runner train` or `runner evaluate` in a process of its own, forked to save the imports."""

    def __init__(self, act: Callable[[], int], folder: Path) -> None:
        self._output = folder / f"output-{len(list(folder.glob('output-*')))}"
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                with self._output.open("w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                sys.stdout = os.fdopen(1, "w")
                os.chdir(folder)
                os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
                code = act()
                sys.stdout.flush()
            except BaseException:
                os.write(2, traceback.format_exc().encode())
                raise
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def finish(self) -> tuple[int, str]:
        """Its exit code, or minus the signal, and all that it wrote."""
        deadline = time.monotonic() + 60
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self._output.read_text()
            time.sleep(0.005)
        return code, self._output.read_text()

    def output(self) -> str:
        """What it has written so far; nothing before the child has made the file."""
        return self._output.read_text() if self._output.exists() else ""

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


SCRIPT: dict[str, Any] = {"steps": 6, "save": 2}


class Bench:
    """A job with a local model and data, and commands on it."""

    def __init__(self, path: Path) -> None:
        model, data = path / "model", path / "rows.jsonl"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"weights")
        data.write_text('{"image": "a.png", "question": "?", "answer": "!"}\n')
        source = {"path": str(data), "format": "vqa"}
        self.job: dict[str, Any] = {
            "name": "bench",
            "model": {"name_or_path": str(model)},
            "datasets": {"train": [source], "eval": [source]},
            "evaluation": {"max_new_tokens": 8},
        }
        self._on(path)

    @classmethod
    def beside(cls, other: Bench, path: Path) -> Bench:
        """Another machine for the same job, whose sources are in the same place there."""
        bench = cls.__new__(cls)
        bench.job = dict(other.job)
        bench._on(path)
        return bench

    def _on(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.run = self.runs / "bench"

    def start(
        self,
        *faults: dict[str, Any],
        verb: str = "train",
        adapter: str | None = None,
        overrides: tuple[str, ...] = (),
        before: Callable[[], object] = lambda: None,
        **script: Any,
    ) -> Command:
        job = self.path / "job.yaml"
        job.write_text(json.dumps(self.job))  # JSON is YAML
        trainer = [sys.executable, str(RANK), json.dumps({**SCRIPT, "faults": faults, **script})]

        def act() -> int:
            # A fake rank needs no GPU, and `launch.gpus_per_node: auto` would start one for each.
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
            before()
            try:
                resolved = resolve(str(job), list(overrides), {})
                if verb == "train":
                    return launch.train(resolved, self.runs, trainer=trainer)
                return launch.evaluate(resolved, self.runs, adapter, trainer=trainer)
            except RunnerError as error:
                sys.stdout.write(f"{error}\n")
                return error.exit_code

        return Command(act, self.path)

    def train(self, *faults: dict[str, Any], **settings: Any) -> tuple[int, str]:
        return self.start(*faults, **settings).finish()

    def result(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run / "result.json").read_text())
        return document

    def events(self) -> list[dict[str, Any]]:
        return list(events.read(self.run / "events.jsonl"))

    def said(self, event: str) -> list[dict[str, Any]]:
        return [one for one in events.read(self.run / "events.jsonl") if one["event"] == event]

    def blob(self, checkpoint: str, name: str) -> Path:
        """The object in the store that holds a file of a checkpoint."""
        manifest = next((self.run / "checkpoints" / "checkpoints").glob(f"*-{checkpoint}.json"))
        key = json.loads(manifest.read_text())["files"][name]["key"]
        return self.run / "checkpoints" / str(key)

    def head(self) -> Head:
        data = FolderStore(self.run / "checkpoints").read("HEAD")
        assert data is not None
        return decode(Head, data.data, "HEAD")

    def weights(self) -> str:
        return (self.run / "adapter" / "weights").read_text()

    def wait_for(self, condition: Callable[[], bool], process: Command | None = None) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            assert process is None or process.poll() is None, process.finish()
            time.sleep(0.01)

    def waiting(self, attempt: int = 1) -> Callable[[], bool]:
        return (self.run / "attempts" / str(attempt) / "waiting").exists


def at(place: str, how: str, attempt: int | None = 1) -> dict[str, Any]:
    fault: dict[str, Any] = {"at": place, "how": how}
    return fault if attempt is None else {**fault, "attempt": attempt}


def whole(store: Store, folder: Path) -> list[int]:
    """Steps of the retained checkpoints, newest first, each fetched through the library and verified."""
    found = store.read("HEAD")
    assert found is not None
    head, manifests = decode(Head, found.data, "HEAD"), Manifests(store)
    named = [*head.retained, *(() if head.final is None else (head.final,))]
    for entry in named:
        download(store, manifests.get(entry), folder / "verified")
    store.close()
    return [entry.step for entry in head.retained]


def hasty() -> None:
    """In the forked command: an owner that is silent for two seconds is dead."""
    custody.TTL, custody.RENEW_EVERY, lease.POLL = 2.0, 0.2, 0.2


class World:
    """One run in a bucket, and machines that come and go."""

    def __init__(self, path: Path, proxy: FaultProxy) -> None:
        self.path = path
        self.proxy = proxy
        self.uri = f"s3://{BUCKET}/runs-{next(_COUNT)}"
        self.machines = 0
        self.first = self.machine()

    def machine(self) -> Bench:
        """A machine that knows nothing; the job's sources are where they are everywhere."""
        folder = self.path / f"machine-{self.machines}"
        folder.mkdir()
        bench = Bench(folder) if self.machines == 0 else Bench.beside(self.first, folder)
        self.machines += 1
        bench.job["checkpoints"] = {"uri": self.uri}
        return bench

    def key(self, key: str) -> str:
        return f"{self.uri.removeprefix(f's3://{BUCKET}/')}/bench/{key}"

    def object(self, key: str) -> bytes | None:
        import boto3

        client = boto3.session.Session().client("s3")
        try:
            return bytes(client.get_object(Bucket=BUCKET, Key=self.key(key))["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    def head(self) -> Head:
        data = self.object("HEAD")
        assert data is not None
        return decode(Head, data, "HEAD")

    def store(self) -> Store:
        """The run's place, past every fault."""
        return open_store(f"{self.uri}/bench", Patience(60, BootClock(), lambda event: None))

    def chain(self) -> list[Head]:
        """Every `HEAD` that the server accepted, in order: one line, whoever wrote."""
        heads = [decode(Head, data, "HEAD") for data in self.proxy.heads]
        assert [head.seq for head in heads] == list(range(1, len(heads) + 1))
        assert [head.epoch for head in heads] == sorted(head.epoch for head in heads)
        return heads

    def manifest(self) -> Manifest:
        """Of the newest checkpoint."""
        newest = self.head().newest
        assert newest is not None
        data = self.object(newest.key)
        assert data is not None
        return decode(Manifest, data, newest.key)


# --- fixtures ---


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    code, output = bench.train()
    assert code == 0, output
    return bench.weights()


@pytest.fixture(scope="module")
def server() -> Iterator[FaultProxy]:
    with s3_server() as port, FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture
def world(tmp_path: Path, server: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> World:
    import boto3  # noqa: F401  once for all commands that are forked from here

    server.clear()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    return World(tmp_path, server)
