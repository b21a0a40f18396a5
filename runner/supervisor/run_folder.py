"""`runs/<name>/`: where everything of a run lies, and the lock that one supervisor holds on it.

job.yaml        the job as it runs, with the source of every value
run.json        what defines the run: a copy of the store's (`runner.supervisor.identity`)
alive           when its supervisor last looked around (`runner.health`)
stop            made by whoever wants the run to save and stop; removed when it is heard
plan.json       of the newest attempt
events.jsonl    what happened (`runner.events`)
fetch/          what was asked of `runner.supervisor.fetch`, and its answer
attempts/<n>/   one trainer each (`runner.supervisor.attempt`)
nodes/<i>/      attempts of a node that follows node 0 (`runner.supervisor.follow`)
outbox/         checkpoints that are published and not yet committed
newest/         the newest committed checkpoint, for a restart on this machine
checkpoints/    the store of a run that has no `checkpoints.uri` (`runner.checkpoint.folder`)
evaluation/     metrics, and every prediction
tracking/       what trackers have of the run, and their logs (`runner.tracking`)
metrics.prom    where it stands, for Prometheus (`runner.tracking.prometheus`)
steps.jsonl     every optimizer step, when training is done
evaluations.jsonl   every evaluation during training (`runner.train.watch`)
adapter/        what was trained
result.json     how it ended (`runner.supervisor.result`)
report.html     the same for people (`runner.report`)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.durable import disk
from runner.errors import NotOwner

LINGER = 2.0
"""Seconds that a lock may outlive its process: its child holds it, too, until it becomes its command."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path
    """Absolute."""

    @property
    def job(self) -> Path:
        return self.path / "job.yaml"

    @property
    def identity(self) -> Path:
        return self.path / "run.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def fetch(self) -> Path:
        return self.path / "fetch"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def outbox(self) -> Path:
        return self.path / "outbox"

    @property
    def newest(self) -> Path:
        return self.path / "newest"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def tracking(self) -> Path:
        return self.path / "tracking"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.prom"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[str | None]:
        """Create the folder and own it until the block ends, or this process does.

        Yields:
            A name of the lock that no other lock has while this machine runs: who holds it next knows that
            this process has ended. None where no boot has an id.

        Raises:
            NotOwner: another process has it.
        """
        file = self.path / ".lock"
        with disk("create the run's folder", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = file.open("ab+", buffering=0)  # a full disk is met by the write, not when it is closed
        with handle:
            with disk("take the run's lock", file):
                if not _locked(handle.fileno()):
                    handle.seek(0)
                    owner = handle.read().decode("utf-8", "replace").strip() or "another process"
                    raise NotOwner(
                        f"run {self.path.name}: {owner} works in {self.path}; remedy: wait for it, or stop "
                        "it (it saves first) and give the same command again"
                    )
                # For the message above only; nothing is decided by it.
                handle.truncate(0)
                handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                found = os.fstat(handle.fileno())
            boot = Path("/proc/sys/kernel/random/boot_id")
            known = boot.read_text().strip() if boot.exists() else None
            yield None if known is None else f"{known}:{found.st_dev}:{found.st_ino}"

    def sweep(self) -> None:
        """Delete what attempts had half written, or copied. Only for the owner, with no trainer alive."""
        with disk("sweep the attempts", self.attempts):
            for pattern in ("*/saving-*", "*/export", "*/restored"):
                for folder in self.attempts.glob(pattern):
                    shutil.rmtree(folder)
            for pattern in ("*/best.safetensors", "*/candidate.safetensors"):
                for file in self.attempts.glob(pattern):
                    file.unlink()


def _locked(file: int) -> bool:
    """Lock a file. False if another process has it, and not only what a killed one leaves for a moment."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - began > LINGER:
                return False
            time.sleep(0.05)
