"""A trainer that starts in milliseconds and keeps the outbox contract: no import of ours, none that is slow.

    python -I -S rank.py '{"steps": 8, "save": 1, "step_seconds": 0.01, "frozen": 150000, "state": 2000}' PLAN

tests/fake_rank.py is the same with the runner's own `seal` and `publish`, and a third of a second of imports
in every start. What this one ends with, `adapter/weights` and `steps.jsonl`, depends on every step.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time

ROWS = 2


def write(path, data):
    """Write a file and make its content last."""
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(folder):
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def bulk(seed, size):
    """Bytes that do not compress, the same for a seed."""
    return hashlib.shake_128(seed.encode()).digest(size)


class Rank:
    def __init__(self, script, plan):
        self.script, self.plan = script, plan
        self.folder, self.run = plan["attempt_dir"], plan["run_dir"]
        self.pipe = int(os.environ["RUNNER_EVENTS_FD"])
        self.value, self.record, self.parent = "", [], None
        if plan["restore"]:
            self.restore(plan["restore"])

    def send(self, event, **fields):
        os.write(self.pipe, json.dumps({"event": event, **fields}).encode() + b"\n")

    def asked(self):
        try:
            with open(f"{self.folder}/request.json", "rb") as file:  # noqa: PTH123
                return json.load(file)["action"]
        except FileNotFoundError:
            return "go"

    def train(self):
        steps, save = self.script["steps"], self.script["save"]
        cut = self.plan["geometry"]
        self.send("phase", phase="load")
        if self.plan["probe"]:
            self.send("phase", phase="probe")
            self.send("probe", per_device=cut["per_device"])
        self.send("plan", rows=steps * ROWS, steps=steps, restored_step=len(self.record), geometry=cut)
        self.send("evaluation", when="before", step=0, metrics=metrics(0.25))
        self.send("phase", phase="train")
        while len(self.record) < steps:
            self.wait()
            number = len(self.record) + 1
            rows = list(range((number - 1) * ROWS, number * ROWS))
            self.send("begin", step=number, ids=rows)
            time.sleep(self.script["step_seconds"])
            self.value = hashlib.sha256(f"{self.value}{number}{rows}".encode()).hexdigest()
            self.record.append({"step": number, "ids": rows, "value": self.value})
            numbers = {"loss": 1 / number, "tokens": 100, "images": ROWS, "seconds": 0.01, "memory_bytes": 1}
            self.send("step", step=number, steps=steps, ids=rows, **numbers)
            asked = self.asked()
            if number % save == 0 or number == steps or asked != "go":
                self.save()
            if asked == "stop" and number < steps:
                self.end("preempted", 75, error=f"stopped at step {number} of {steps}; state is saved")
        self.send("phase", phase="evaluate_after")
        adapter = f"{self.run}/adapter"
        os.makedirs(adapter, exist_ok=True)  # noqa: PTH103
        write(f"{adapter}/weights", self.value.encode())
        lines = "".join(json.dumps(line) + "\n" for line in self.record)
        write(f"{self.run}/steps.jsonl", lines.encode())
        both = {"before": metrics(0.25), "after": metrics(0.75)}
        self.end("done", 0, step=steps, metrics=both, adapter=adapter, facts={"engine": "chaos"})

    def wait(self):
        if self.asked() != "wait":
            return
        self.send("phase", phase="wait")
        while self.asked() == "wait":
            time.sleep(0.01)
        self.send("phase", phase="train")

    def save(self):
        """Save, seal and publish: every file and name synced, the manifest last, then one rename."""
        step = len(self.record)
        name = f"{step:08d}-{self.plan['epoch']:06d}-{self.plan['attempt']:04d}"
        self.send("phase", phase="save")
        saving = f"{self.folder}/saving-{step:08d}"
        os.mkdir(saving)  # noqa: PTH102
        contents = {
            "frozen.bin": bulk("frozen", self.script["frozen"]),
            "state.bin": bulk(self.value, self.script["state"]),
            "state.json": json.dumps({"value": self.value, "record": self.record}).encode(),
        }
        files = {}
        for file, data in contents.items():
            write(f"{saving}/{file}", data)
            files[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        sync(saving)
        cut = self.plan["geometry"]["per_device"]
        asked = self.plan["job"]["training"]["per_device_train_batch_size"]
        head = {"format": 1, "id": name, "step": step, "parent": self.parent, "files": files}
        document = {**head, "extra": {"batch": {"per_device": cut, "asked": asked}}}
        write(f"{saving}/checkpoint.json", json.dumps(document).encode())
        sync(saving)
        published = f"{self.run}/outbox/{name}"
        os.rename(saving, published)  # noqa: PTH104
        sync(f"{self.run}/outbox")
        sync(self.folder)
        self.parent = name
        self.send("checkpoint", id=name, step=step, path=published, seconds=0.01)
        self.send("phase", phase="train")

    def restore(self, folder):
        with open(f"{folder}/state.json", "rb") as file:  # noqa: PTH123
            state = json.load(file)
        self.value, self.record, self.parent = state["value"], state["record"], folder.rpartition("/")[2]
        for name, seed in (("state.bin", self.value), ("frozen.bin", "frozen")):
            with open(f"{folder}/{name}", "rb") as file:  # noqa: PTH123
                content = file.read()
            if content != bulk(seed, len(content)):
                sys.exit(f"RuntimeError: {folder}/{name} is not what was saved")

    def end(self, outcome, code, error=None, **fields):
        document = {"format": 1, "outcome": outcome, "exit_code": code, "error": error, **fields}
        write(f"{self.folder}/outcome.json.tmp", json.dumps(document).encode())
        os.rename(f"{self.folder}/outcome.json.tmp", f"{self.folder}/outcome.json")  # noqa: PTH104
        sys.exit(code)


def metrics(share):
    return {"relaxed_accuracy": {"overall": share, "n": 4, "human": share, "n_human": 2}}


def follow(lifeline):
    """Die with the supervisor."""
    if not os.read(lifeline, 1):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with open(sys.argv[2], "rb") as file:  # noqa: PTH123
        plan = json.load(file)
    threading.Thread(target=follow, args=(int(os.environ["RUNNER_LIFELINE_FD"]),), daemon=True).start()
    Rank(json.loads(sys.argv[1]), plan).train()
