"""A trainer without torch that keeps the whole contract: plan in; events, checkpoints, request, outcome out.

    fake_rank.py '{"steps": 6, "save": 2, "faults": [{"at": "step:4", "attempt": 1, "how": "kill"}]}' PLAN

Its "training" is a chain of hashes, so that what it ends with says whether any step was lost or done twice.
A fault happens at a place, in one attempt or in all:

    at    load, probe (trying the plan's size), step:N (in the middle of it), saving:N (half written),
          saved:N (published, not told), told:N (committed, before anything else), evaluate, outcome (after
          it is written)
    how   kill, exit, wait (until asked to stop), linger (until killed), orphan (kill the supervisor),
          noise (on the events pipe), rot (flip a byte of the published checkpoint), crash:CODE (an outcome),
          full (an outcome: out of memory), eat (memory, without end)
    above only where the plan's per-device size is above this
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runner.checkpoint.files import publish, seal

ROWS = 2
"""Rows of a step."""


class Rank:
    def __init__(self, script: dict[str, Any], plan: dict[str, Any]) -> None:
        self.plan = plan
        self.folder = Path(plan["attempt_dir"])
        self.run = Path(plan["run_dir"])
        self.steps: int = script["steps"]
        self.save_every: int = script["save"]
        self.faults: list[dict[str, Any]] = script.get("faults", [])
        self.events = os.fdopen(int(os.environ["RUNNER_EVENTS_FD"]), "wb", buffering=0)
        self.value, self.done, self.parent = "", 0, None
        if plan["restore"]:
            state = json.loads((Path(plan["restore"]) / "state.json").read_text())
            self.value, self.done, self.parent = state["value"], state["step"], Path(plan["restore"]).name

    def send(self, event: str, **fields: Any) -> None:
        self.events.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def asked(self) -> bool:
        return (self.folder / "request.json").exists()

    def at(self, place: str) -> None:
        for fault in self.faults:
            here = fault["at"] == place and fault.get("attempt", self.plan["attempt"]) == self.plan["attempt"]
            if here and self.plan["geometry"]["per_device"] > fault.get("above", 0):
                self.break_down(fault["how"], place)

    def break_down(self, how: str, place: str) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "exit":
            print(
                "Traceback (most recent call last):\n  File ...\nRuntimeError: no luck\nlater noise",
                flush=True,
            )
            os._exit(3)
        elif how == "wait":
            (self.folder / "waiting").touch()
            while not self.asked():
                time.sleep(0.005)
        elif how == "linger":
            (self.folder / "waiting").touch()
            signal.pause()
        elif how == "orphan":
            (self.folder / "pid").write_text(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        elif how == "noise":
            self.events.write(b"\x00\xff not json\n" + b"x" * 3_000_000 + b"\n[1]\n" + b'{"event": "step"}\n')
        elif how == "rot":
            path = (
                self.run
                / "outbox"
                / f"{place.partition(':')[2]:0>8}-{self.plan['attempt']:04d}"
                / "state.json"
            )
            path.write_bytes(path.read_bytes()[:-1] + b"~")
        elif how == "full":
            self.end("out_of_memory", 1, error="it does not fit")
        elif how == "eat":
            eaten = []
            while True:
                eaten.append(b"x" * (1 << 24))
        else:
            code = int(how.partition(":")[2])
            self.end("failed", code, error=f"row 3 of data is bad, says {code}")

    def end(self, outcome: str, code: int, **fields: Any) -> None:
        document = {"format": 1, "outcome": outcome, "exit_code": code, "error": None, **fields}
        temporary = self.folder / "outcome.json.tmp"
        temporary.write_text(json.dumps(document))
        temporary.replace(self.folder / "outcome.json")
        self.at("outcome")
        sys.exit(code)

    def train(self) -> None:
        self.send("phase", phase="load")
        self.at("load")
        self.send("audit", lines=["[answer] carries loss"])
        cut = self.plan["geometry"]
        if self.plan["probe"]:
            self.send("phase", phase="probe")
            self.send("probe", per_device=cut["per_device"])
            self.at("probe")
        self.send("plan", rows=self.steps * ROWS, steps=self.steps, restored_step=self.done, geometry=cut)
        self.send("evaluation", when="before", step=0, metrics=_metrics(0.25))
        self.send("phase", phase="train")
        while self.done < self.steps:
            self.step()
        self.send("phase", phase="evaluate_after")
        self.at("evaluate")
        self.send("progress", phase="evaluate_after", done=4, total=4)
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
        self.at(f"step:{number}")
        self.value = hashlib.sha256(f"{self.value}{number}{rows}".encode()).hexdigest()
        self.done = number
        numbers = {"loss": 1 / number, "tokens": 100, "images": ROWS, "seconds": 0.5, "memory_bytes": 1 << 30}
        self.send("step", step=number, steps=self.steps, ids=rows, **numbers)
        asked = self.asked()
        if number % self.save_every == 0 or number == self.steps or asked:
            self.save()
        if asked and number < self.steps:
            self.end("preempted", 75, error=f"stopped at step {number} of {self.steps}; state is saved")

    def save(self) -> None:
        name = f"{self.done:08d}-{self.plan['attempt']:04d}"
        self.send("phase", phase="save")
        saving = self.folder / f"saving-{self.done:08d}"
        saving.mkdir()
        (saving / "state.json").write_text(json.dumps({"step": self.done, "value": self.value}))
        self.at(f"saving:{self.done}")
        asked = self.plan["job"]["training"]["per_device_train_batch_size"]
        record = {"per_device": self.plan["geometry"]["per_device"], "asked": asked}
        seal(saving, id=name, step=self.done, parent=self.parent, extra={"batch": record})
        path = publish(saving, self.run / "outbox", name)
        self.parent = name
        self.at(f"saved:{self.done}")
        self.send("checkpoint", id=name, step=self.done, path=str(path), seconds=0.1)
        self.at(f"told:{self.done}")
        self.send("phase", phase="train")

    def evaluate(self) -> None:
        name = "base" if self.plan["adapter"] is None else "adapter"
        score = 0.25 if name == "base" else 0.75
        self.at("evaluate")
        made = self.run / "evaluation"
        made.mkdir()
        (made / f"{name}.predictions.jsonl").write_text('{"prediction": "14"}\n')
        (made / f"{name}.json").write_text(json.dumps({"format": 1, "metrics": _metrics(score)}))
        self.end("done", 0, step=0, metrics={name: _metrics(score)})


def _metrics(share: float) -> dict[str, Any]:
    return {"relaxed_accuracy": {"overall": share, "n": 4, "human": share, "n_human": 2}}


def _die_with(lifeline: int) -> None:
    if not os.read(lifeline, 1):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    script, plan = json.loads(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    if script.get("lifeline_only"):  # what holds without Linux
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    threading.Thread(target=_die_with, args=(int(os.environ["RUNNER_LIFELINE_FD"]),), daemon=True).start()
    rank = Rank(script, plan)
    if plan["purpose"] == "train":
        rank.train()
    else:
        rank.evaluate()


if __name__ == "__main__":
    main()
