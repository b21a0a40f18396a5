"""demo-sft in the image as a strict cluster runs it: read-only, without rights, 4 GiB, nothing but the store.

The runs are shortened; what they must agree in are the bytes of the adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.image.containers import SECRET, Bucket, Container, container

SHORT = ("training.max_steps=12", "training.logging_steps=1", "evaluation.max_samples=8")


def short(prefix: str) -> tuple[str, ...]:
    return (*SHORT, f"checkpoints.uri=s3://bucket/{prefix}")


def adapter(one: Container) -> str:
    weights = one.folder / "runs" / "demo-sft" / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(store: Bucket, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of a run that nobody disturbed."""
    with container(store, tmp_path_factory.mktemp("runs") / "undisturbed") as one:
        began = time.monotonic()
        one.train(*short("undisturbed"))
        assert one.wait() == 0, one.said()
        print(f"\ndemo-sft, 12 steps in the image: {time.monotonic() - began:.0f} s")
        assert one.result()["outcome"] == "done"
        assert SECRET not in one.said()
        for path in one.folder.rglob("*"):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path
        assert SECRET not in store.everything()
        written = {path.name for path in one.folder.iterdir()}
        assert written <= {"runs", "cache", "home"}, "something wrote beside what is declared"
        return adapter(one)


INSIDE = """
import errno, os, pathlib, pwd
status = dict(line.split(":\\t", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
assert os.getuid() == os.getgid() == os.geteuid() == 10001 and pwd.getpwuid(10001).pw_name == "runner"
assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")), status
assert status["NoNewPrivs"].strip() == "1"
for place in ("/scratch", "/tmp", "/dev/shm"):
    pathlib.Path(place, "probe").write_text("")
free = []
for folder, folders, _ in os.walk("/"):
    folders[:] = [] if folder in ("/proc", "/sys", "/dev", "/scratch", "/tmp") else folders
    try:
        pathlib.Path(folder, "probe").touch()
        free.append(folder)
    except OSError as error:
        assert error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT), (folder, error)
assert sorted(free) == ["/scratch", "/tmp"], free
import bitsandbytes, deepspeed, torch, transformers, trl
import importlib.util
assert importlib.util.find_spec("pip") is None
print("all is as it should be", sorted({name.split(".")[0] for name in os.environ if name.startswith("PIP")}))
"""


def test_it_has_no_rights_and_its_libraries_need_no_compiler(store: Bucket, tmp_path: Path) -> None:
    with container(store, tmp_path / "one") as one:
        one.start("-c", INSIDE, options=("--entrypoint", "python3"))
        assert one.wait() == 0, one.said()
        assert "all is as it should be []" in one.said()


def test_it_reaches_nothing_but_the_store(store: Bucket, tmp_path: Path) -> None:
    code = """
import socket
socket.create_connection(("127.0.0.1", 9000), 5).close()
for address in (("1.1.1.1", 443), ("169.254.169.254", 80)):
    try: socket.create_connection(address, 5)
    except OSError as error: print(error.strerror)
"""
    with container(store, tmp_path / "one") as one:
        one.start("-c", code, options=("--entrypoint", "python3"))
        assert one.wait() == 0, one.said()
        assert one.said().splitlines() == ["Network is unreachable"] * 2


def test_it_reaps_orphans_as_process_1(store: Bucket, tmp_path: Path) -> None:
    """No init stands before it: an orphan that ends in the container is gone a moment later."""
    with container(store, tmp_path / "one") as one:
        one.train(*short("orphans"))
        one.wait_for("loading the model")
        orphan = "import os, sys; os.fork() and sys.exit(); os.setsid(); os.execvp('sleep', ['sleep', '1'])"
        subprocess.run([os.environ["BUILDER"], "exec", one.name, "python3", "-c", orphan], check=True)
        tasks = Path(f"/proc/{one.supervisor()}/task/{one.supervisor()}/children")
        deadline = time.monotonic() + 5
        assert any(command(child) == "sleep" for child in tasks.read_text().split())
        while any(command(child) == "sleep" for child in tasks.read_text().split()):
            assert time.monotonic() < deadline, "process 1 does not reap"
            time.sleep(0.1)


def command(process: str) -> str:
    """Its name, of a zombie too; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def test_after_sigterm_the_next_container_finishes_with_the_same_bytes(
    store: Bucket, tmp_path: Path, undisturbed: str
) -> None:
    with container(store, tmp_path / "first") as first:
        first.train(*short("term"))
        first.wait_for("step 4/12")
        began = time.monotonic()
        first.signal("TERM")
        assert first.wait(60) == 75, first.said()
        print(f"\nSIGTERM to exit 75: {time.monotonic() - began:.1f} s")
        assert SECRET not in first.said()
    with container(store, tmp_path / "second") as second:
        second.train(*short("term"))
        assert second.wait() == 0, second.said()
        assert second.result()["attempts"] == 2
        assert adapter(second) == undisturbed


def test_both_kills_for_memory_are_survived_by_a_smaller_batch(store: Bucket, tmp_path: Path) -> None:
    """First the kernel takes the trainer, which the supervisor survives; then process 1, and so all."""
    with container(store, tmp_path / "first") as first:
        first.train(*short("memory"))
        first.wait_for("evaluating before training")
        group, trainer = Group.of(first.supervisor()), first.trainer()
        first.wait_for("step 3/12")
        os.kill(trainer, signal.SIGSTOP)
        # Stopped as well, so that it does not end the trainer before the kernel does.
        os.kill(first.supervisor(), signal.SIGSTOP)
        group.fill(trainer, until=lambda: state(trainer) in ("Z", ""))
        os.kill(first.supervisor(), signal.SIGCONT)
        first.wait_for("with 16 rows per device instead of 32")
        deadline = time.monotonic() + 60
        while (new := children_of(first)) in ([], [trainer]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Before it trains nobody ends it for being near the limit; the lease says how near it came.
        os.kill(new[0], signal.SIGSTOP)
        group.tighten(0.97)
        deadline = time.monotonic() + 60
        while (store.head("memory/demo-sft").get("memory_peak") or 0) < 0.95:
            assert time.monotonic() < deadline, store.head("memory/demo-sft")
            time.sleep(1)
        process = first.process
        assert process is not None
        group.fill(first.supervisor(), until=lambda: process.poll() is not None)
        assert first.wait(30) == 137, first.said()
    time.sleep(1)
    with container(store, tmp_path / "second") as second:
        second.train(*short("memory"))
        assert second.wait() == 0, second.said()
        one, two = second.result()["restarts"]
        assert "SIGKILL by the kernel: its control group is out of memory" in one["reason"], one
        assert one["per_device"] == {"from": 32, "to": 16}
        assert "killed together with its supervisor at " in two["reason"], two
        assert two["per_device"] == {"from": 16, "to": 8}
        assert second.result()["steps"] == 12


def state(process: int) -> str:
    """Letter of /proc; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def children_of(one: Container) -> list[int]:
    with contextlib.suppress(ValueError, OSError):
        return [one.trainer()]
    return []


class Group:
    """The memory control group of a container, from outside."""

    EAT = """
import pathlib, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text("0")
eaten = []
while True:
    eaten.append(b"x" * (8 << 20))
"""
    """Joins and fills it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.v1 = (folder / "memory.limit_in_bytes").exists()

    @classmethod
    def of(cls, process: int) -> Group:
        lines = [line.split(":", 2) for line in Path(f"/proc/{process}/cgroup").read_text().splitlines()]
        for _, controllers, path in lines:
            if "memory" in controllers.split(","):
                return cls(Path("/sys/fs/cgroup/memory", path.lstrip("/")))
        return cls(Path("/sys/fs/cgroup", lines[0][2].lstrip("/")))

    def tighten(self, share: float) -> None:
        """Lower the limit until what the kernel cannot drop is that share of it."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        names = ("total_inactive_file", "total_active_file") if self.v1 else ("inactive_file", "active_file")
        used = int((self.folder / ("memory.usage_in_bytes" if self.v1 else "memory.current")).read_text())
        held = used - sum(int(stat[name]) for name in names)
        (self.folder / ("memory.limit_in_bytes" if self.v1 else "memory.max")).write_text(
            str(int(held / share))
        )

    def fill(self, victim: int, until: Callable[[], bool], seconds: float = 60) -> None:
        """Until the kernel has taken the process that it is told to take first."""
        Path(f"/proc/{victim}/oom_score_adj").write_text("1000")
        with self._eating():
            deadline = time.monotonic() + seconds
            while not until():
                assert time.monotonic() < deadline, "nobody was killed"
                time.sleep(0.01)

    @contextlib.contextmanager
    def _eating(self) -> Iterator[None]:
        process = subprocess.Popen(
            [sys.executable, "-c", self.EAT, str(self.folder)], stderr=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()
