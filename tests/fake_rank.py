"""A trainer without torch that keeps the whole contract: plan in; events, checkpoints, request, outcome out.

    fake_rank.py '{"steps": 6, "save": 2, "faults": [{"at": "step:4", "attempt": 1, "how": "kill"}]}' PLAN

Several are ranks: only the first writes checkpoints, only the first of a machine events, and none goes on
while another is missing.

Its "training" is a chain of hashes, so that what it ends with says whether any step was lost or done twice.
The script:

    steps, save     steps in all, and between two saves
    faults          how it breaks down (tests/fake_faults.py)
    step_seconds    of sleep in every step, 0 if absent
    record          whether checkpoints have a steps.jsonl, as a real trainer's
    frozen_bytes    of frozen.bin, a file that is the same in every checkpoint; 1000
    state_bytes     of state.bin, a file that depends on every step so far; 1000
    meet            the folder where ranks of several machines meet; in the attempt's own if absent
    lifeline_only   whether only the pipe ends it when its supervisor dies, as where there is no Linux
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runner.checkpoint.files import publish, seal
from runner.durable import disk
from runner.errors import RunnerError
from runner.request import Reader
from tests.fake_faults import Faults, checkpoint_id

ROWS = 2
"""Rows of a step."""


class Peers:
    """The ranks of an attempt, which meet through files: who waits for one that is dead waits for ever.

    All of them make the same calls in the same order, as with collectives.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self._folder, self._rank, self._world = folder, rank, world
        self._calls = 0
        if world > 1:
            self._folder.mkdir(parents=True, exist_ok=True)

    def agree(self, word: str) -> str:
        """What the first of them says, when all are here."""
        self._calls += 1
        if self._world == 1:
            return word
        said = [self._folder / f"{self._calls}-{rank}" for rank in range(self._world)]
        temporary = said[self._rank].with_suffix(".tmp")
        temporary.write_text(word)
        temporary.replace(said[self._rank])
        while not all(file.exists() for file in said):
            time.sleep(0.002)
        return said[0].read_text()


class Rank:
    def __init__(self, script: dict[str, Any], plan: dict[str, Any]) -> None:
        self.script, self.plan = script, plan
        self.folder, self.run = Path(plan["attempt_dir"]), Path(plan["run_dir"])
        self.steps: int = script["steps"]
        self.requests = Reader(self.folder)
        self.rank = int(os.environ.get("RANK", 0))
        meet = Path(script["meet"], str(plan["attempt"])) if "meet" in script else self.folder / "peers"
        self.saves = 0
        self.peers = Peers(meet, self.rank, int(os.environ.get("WORLD_SIZE", 1)))
        pipe = os.environ.get("RUNNER_EVENTS_FD")
        fd = os.open(os.devnull, os.O_WRONLY) if pipe is None else int(pipe)
        self.events = os.fdopen(fd, "wb", buffering=0)
        self.faults = Faults(script.get("faults", []), plan, self.rank, self.events.write, self.end)
        self.value, self.done, self.parent = "", 0, None
        if plan["restore"]:
            self.restore(Path(plan["restore"]))

    def send(self, event: str, **fields: Any) -> None:
        self.events.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def end(self, outcome: str, code: int, **fields: Any) -> None:
        document = {"format": 1, "outcome": outcome, "exit_code": code, "error": None, **fields}
        name = f"outcome-{self.rank}.json" if self.rank else "outcome.json"
        temporary = self.folder / f"{name}.tmp"
        temporary.write_text(json.dumps(document))
        temporary.replace(self.folder / name)
        self.faults.at("outcome")
        sys.exit(code)

    def train(self) -> None:
        self.send("phase", phase="load")
        self.faults.at("load")
        self.send("audit", lines=["[answer] carries loss"])
        cut = self.plan["geometry"]
        if self.plan["probe"]:
            self.send("phase", phase="probe")
            self.send("probe", per_device=cut["per_device"])
            self.faults.at("probe")
        self.send("plan", rows=self.steps * ROWS, steps=self.steps, restored_step=self.done, geometry=cut)
        self.send("evaluation", when="before", step=0, metrics=_metrics(0.25))
        self.send("phase", phase="train")
        if self.done < self.steps:
            self.wait_if_asked()
        while self.done < self.steps:
            self.step()
        self.send("phase", phase="evaluate_after")
        self.faults.at("evaluate")
        self.send("progress", phase="evaluate_after", done=4, total=4)
        if self.rank:
            self.end("done", 0, step=self.steps)
        adapter = self.run / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "weights").write_text(self.value)
        metrics = {"before": _metrics(0.25), "after": _metrics(0.75)}
        self.end("done", 0, step=self.steps, metrics=metrics, adapter=str(adapter), facts={"engine": "fake"})

    def step(self) -> None:
        number = self.done + 1
        rows = list(range(self.done * ROWS, number * ROWS))
        self.send("begin", step=number, ids=rows)
        self.faults.at(f"step:{number}")
        time.sleep(self.script.get("step_seconds", 0))
        self.peers.agree("gradients")
        self.value = hashlib.sha256(f"{self.value}{number}{rows}".encode()).hexdigest()
        self.done = number
        numbers = {"loss": 1 / number, "tokens": 100, "images": ROWS, "seconds": 0.5, "memory_bytes": 1 << 30}
        self.send("step", step=number, steps=self.steps, ids=rows, **numbers)
        now = self.requests.now()
        asked, saves = self.peers.agree(f"{now.action} {now.saves}").split()
        more, self.saves = int(saves) != self.saves, int(saves)
        if asked == "go" and not more and number % self.script["save"] and number < self.steps:
            return
        if self.rank == 0:
            self.save()
        self.peers.agree("saved")
        if number < self.steps:
            if asked == "stop":
                self.stop()
            self.wait_if_asked()

    def record(self, step: int) -> dict[str, Any]:
        """What a real trainer keeps of a step."""
        rows = list(range((step - 1) * ROWS, step * ROWS))
        rate = 1e-4 * (self.steps - step)
        numbers = {"loss": 1 / step, "grad_norm": None if step == 2 else 0.5 / step, "learning_rate": rate}
        return {"step": step, **numbers, "tokens": 100, "images": ROWS, "rows": rows}

    def stop(self) -> None:
        self.end("preempted", 75, error=f"stopped at step {self.done} of {self.steps}; state is saved")

    def wait_if_asked(self) -> None:
        """Everything that was done is saved: do nothing while that is asked for."""
        if self.peers.agree(self.requests.now().action) != "wait":
            return
        self.send("phase", phase="wait")
        self.faults.at(f"waiting:{self.done}")
        while (asked := self.peers.agree(self.requests.now().action)) == "wait":
            time.sleep(0.01)
        if asked == "stop":
            self.stop()
        self.send("phase", phase="train")

    def save(self) -> None:
        name = checkpoint_id(self.plan, self.done)
        self.send("phase", phase="save")
        saving = self.folder / f"saving-{self.done:08d}"
        try:
            with disk("save a checkpoint", saving):
                saving.mkdir()
                (saving / "state.json").write_text(json.dumps({"step": self.done, "value": self.value}))
                if self.script.get("record"):
                    lines = [json.dumps(self.record(step)) + "\n" for step in range(1, self.done + 1)]
                    (saving / "steps.jsonl").write_text("".join(lines))
                (saving / "state.bin").write_bytes(_bytes(self.value, self.script.get("state_bytes", 1000)))
                self.faults.at(f"saving:{self.done}")
                frozen = _bytes("frozen", self.script.get("frozen_bytes", 1000))
                (saving / "frozen.bin").write_bytes(frozen)
        except RunnerError as error:
            shutil.rmtree(saving, ignore_errors=True)
            self.end("failed", error.exit_code, error=str(error))
        asked = self.plan["job"]["training"]["per_device_train_batch_size"]
        cut = self.plan["geometry"]
        record = {"per_device": cut["per_device"], "asked": asked}
        record |= {"world": cut["world"], "strategy": self.plan["strategy"]}
        seal(saving, id=name, step=self.done, parent=self.parent, extra={"batch": record})
        path = publish(saving, self.run / "outbox", name)
        self.parent = name
        self.faults.at(f"saved:{self.done}")
        self.send("checkpoint", id=name, step=self.done, path=str(path), seconds=0.1)
        self.faults.at(f"told:{self.done}")
        self.send("phase", phase="train")

    def restore(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        self.value, self.done, self.parent = state["value"], state["step"], folder.name
        for file, seed in (("state.bin", self.value), ("frozen.bin", "frozen")):
            content = (folder / file).read_bytes()
            if content != _bytes(seed, len(content)):
                sys.exit(f"RuntimeError: {folder / file} is not what was saved")

    def evaluate(self) -> None:
        name = "base" if self.plan["adapter"] is None else "adapter"
        score = 0.25 if name == "base" else 0.75
        self.faults.at("evaluate")
        self.send("evaluation", when=name, step=0, metrics=_metrics(score))
        made = self.run / "evaluation"
        made.mkdir()
        (made / f"{name}.predictions.jsonl").write_text('{"prediction": "14"}\n')
        (made / f"{name}.json").write_text(json.dumps({"format": 1, "metrics": _metrics(score)}))
        self.end("done", 0, step=0, metrics={name: _metrics(score)})


def _bytes(seed: str, size: int) -> bytes:
    """Bytes that do not compress, the same for a seed."""
    return hashlib.shake_128(seed.encode()).digest(size)


def _metrics(share: float) -> dict[str, Any]:
    return {"relaxed_accuracy": {"overall": share, "n": 4, "human": share, "n_human": 2}}


def _die_with(lifeline: int) -> None:
    if not os.read(lifeline, 1):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    script, plan = json.loads(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    if script.get("lifeline_only"):
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    threading.Thread(target=_die_with, args=(int(os.environ["RUNNER_LIFELINE_FD"]),), daemon=True).start()
    rank = Rank(script, plan)
    if plan["purpose"] == "train":
        rank.train()
    else:
        rank.evaluate()


if __name__ == "__main__":
    main()
