"""Containers as a strict cluster would run them, and an S3 server that is all they reach.

The server and every container share one network namespace that has nothing but a loopback: nothing else can
be reached, and no packet leaves the machine. Needs root, because it enters the namespace with nsenter.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.s3_server import BUCKET, ENVIRONMENT

ROOT = Path(__file__).parents[2]
UID = 10001
PORT = 9000
SECRET = "planted-5ecret-" + uuid.uuid4().hex
"""Stands in the environment of every container, as a credential does."""

STRICT = (
    *("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *(
        "--memory",
        "4g",
        "--pids-limit",
        "1000",
        "--ulimit",
        "nofile=1024:1024",
        "--ulimit",
        "nproc=1000:1000",
    ),
    *("--tmpfs", "/tmp:rw,size=256m,mode=1777"),
)


def builder(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([os.environ["BUILDER"], *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, f"{arguments[0]}: {done.stderr}"
    return done


def writable() -> tuple[str, ...]:
    """podman mounts memory over more than is asked for, and hands its own proxies on."""
    return (
        ("--read-only-tmpfs=false", "--http-proxy=false") if os.environ["BUILDER"].endswith("podman") else ()
    )


@dataclass(frozen=True)
class Bucket:
    """The server, and the namespace in which it is alone with the containers."""

    network: str
    """Name of the container that holds the namespace."""
    pid: int

    def entered(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command]

    def python(self, code: str, *arguments: str) -> str:
        """What a program prints that runs beside the server, with `s3` as its client."""
        setup = f"import boto3, json, sys; s3 = boto3.client('s3', endpoint_url='http://127.0.0.1:{PORT}')\n"
        clean = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        done = subprocess.run(
            self.entered(sys.executable, "-c", setup + code, *arguments),
            env={**clean, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def head(self, run: str) -> dict[str, Any]:
        """`HEAD` of a run; empty before there is one."""
        code = f"""
try: print(s3.get_object(Bucket='{BUCKET}', Key=sys.argv[1])['Body'].read().decode())
except s3.exceptions.NoSuchKey: print('{{}}')
"""
        read: dict[str, Any] = json.loads(self.python(code, f"{run}/HEAD"))
        return read

    def everything(self) -> str:
        """All objects, one after the other, as Latin-1 text."""
        code = f"""
for page in s3.get_paginator('list_objects_v2').paginate(Bucket='{BUCKET}'):
    for one in page.get('Contents', ()):
        body = s3.get_object(Bucket='{BUCKET}', Key=one['Key'])['Body'].read()
        sys.stdout.buffer.write(body.decode('latin-1').encode())
"""
        return self.python(code)


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    name = f"runner-network-{uuid.uuid4().hex[:8]}"
    wait = ("-c", "import signal; signal.sigwait([signal.SIGTERM])")
    image = os.environ["IMAGE_UNDER_TEST"]
    builder(
        "run",
        "--detach",
        "--name",
        name,
        "--network",
        "none",
        *STRICT,
        "--entrypoint",
        "python3",
        image,
        *wait,
    )
    server = None
    try:
        pid = int(builder("inspect", "--format", "{{.State.Pid}}", name).stdout)
        here = Bucket(name, pid)
        clean = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        server = subprocess.Popen(
            here.entered(sys.executable, "-W", "ignore", "-m", "tests.s3_server", str(PORT), "0"),
            cwd=ROOT,
            env=clean,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                here.python(f"s3.create_bucket(Bucket='{BUCKET}')")
                break
            except AssertionError:
                assert time.monotonic() < deadline and server.poll() is None, "the S3 server did not start"
        yield here
    finally:
        if server is not None:
            server.kill()
            server.wait()
        builder("rm", "--force", name)


@dataclass
class Container:
    """One container with a fresh scratch folder, which goes with it."""

    store: Bucket
    folder: Path
    """Of this machine; mounted as /scratch."""
    log: Path
    name: str = field(default_factory=lambda: f"runner-test-{uuid.uuid4().hex[:8]}")
    process: subprocess.Popen[bytes] | None = None

    def start(self, *words: str, options: tuple[str, ...] = ()) -> None:
        environment = {
            **ENVIRONMENT,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "HF_TOKEN": SECRET,
            "PLANTED": SECRET,
            "RUNNER_GRACE_SECONDS": "60",
        }
        said = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        command = [os.environ["BUILDER"], "run", "--name", self.name, *STRICT, *writable()]
        command += ["--network", f"container:{self.store.network}", *said, *options]
        command += [
            "--volume",
            f"{self.folder}:/scratch",
            "--volume",
            f"{ROOT}/jobs/demo-sft.yaml:/etc/job/job.yaml:ro",
        ]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, os.environ["IMAGE_UNDER_TEST"], *words],
                cwd=self.log.parent,  # podman's conmon leaves a file there when memory runs out
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def train(self, *overrides: str, options: tuple[str, ...] = ()) -> None:
        self.start("train", "/etc/job/job.yaml", "--runs", "/scratch/runs", *overrides, options=options)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, seconds: float = 300) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while words not in self.said():
            assert self.process.poll() is None, f"ended before {words!r}: {self.said()}"
            assert time.monotonic() < deadline, f"no {words!r}: {self.said()}"
            time.sleep(0.05)

    def signal(self, name: str) -> None:
        builder("kill", "--signal", name, self.name)

    def wait(self, seconds: float = 600) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(seconds)

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "runs" / "demo-sft" / "result.json").read_text())
        return found

    def supervisor(self) -> int:
        """The id of its process 1 on this machine."""
        return int(builder("inspect", "--format", "{{.State.Pid}}", self.name).stdout)

    def trainer(self) -> int:
        """The id of the only child that is a trainer."""
        children = Path(f"/proc/{self.supervisor()}/task/{self.supervisor()}/children").read_text().split()
        (found,) = [
            int(child) for child in children if b"runner.train" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        return found


@contextlib.contextmanager
def container(store: Bucket, folder: Path) -> Iterator[Container]:
    """A container that is gone afterwards, with all that it wrote."""
    folder.mkdir(parents=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    os.chown(scratch, UID, UID)
    here = Container(store, scratch, folder / "log")
    try:
        yield here
    finally:
        builder("rm", "--force", here.name, check=False)
        if here.process is not None:
            here.process.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)
