"""Runs whose bucket and network fail in every way, at every kind of call: only the time is another.

The supervisor is real, the server is real, and the proxy before it plays the fault. Two machines go through
everything that a run asks of its store: the first begins, commits and is told to stop; the second takes over,
restores, goes on and deletes what is old. Pauses are short, and a time-out is a second.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Mapping

import pytest

from tests.fault_proxy import Fault, FaultProxy
from tests.machines import Bench, World, at, hasty, whole

PART = 5 << 20
"""S3's smallest, and moto's."""

FROZEN = 2 * PART + 1
"""Bytes of a file that goes in three parts, once."""

TIME_OUT = 1.0


def brisk() -> None:
    """In the forked command: short pauses and time-outs, parts of the smallest size, nothing waits for readers."""
    import botocore.config

    from runner.checkpoint import s3, store
    from runner.supervisor import custody

    hasty()
    custody.TTL = 10.0
    store.FIRST_PAUSE, store.LONGEST_PAUSE, custody.GRACE = 0.02, 0.1, 0.0
    s3.Settings = functools.partial(s3.Settings, whole=PART, part=PART)
    config = botocore.config.Config
    botocore.config.Config = lambda **fields: config(**{**fields, "read_timeout": TIME_OUT})


CALLS: dict[str, tuple[str, str, str]] = {
    "probe": ("PUT", r"/probe/\w+/once", "PutObject"),
    "unprobe": ("DELETE", r"/probe/\w+/race", "DeleteObject"),
    "take": ("PUT", "/HEAD", "PutObject"),
    "identity": ("PUT", r"/run\.json", "PutObject"),
    "blob": ("PUT", "/blobs/[^?]*", "PutObject"),
    "manifest": ("PUT", r"/checkpoints/[^?]*\.json", "PutObject"),
    "events": ("PUT", r"/events/[^?]*\.jsonl", "PutObject"),
    "begin parts": ("POST", r"\?uploads", "CreateMultipartUpload"),
    "part": ("PUT", r"partNumber=2.*|uploadId=.*partNumber=2", "UploadPart"),
    "complete parts": ("POST", r"\?uploadId=[^&]*", "CompleteMultipartUpload"),
    "list": ("GET", r"list-type=2.*checkpoints.*", "ListObjectsV2"),
    "renew": ("PUT", "/HEAD", "PutObject"),
    "read HEAD": ("GET", "/HEAD", "GetObject"),
    "read identity": ("GET", r"/run\.json", "GetObject"),
    "read manifest": ("GET", r"/checkpoints/[^?]*\.json", "GetObject"),
    "read blob": ("GET", "/blobs/.*", "GetObject"),
    "delete": ("DELETE", "/checkpoints/.*", "DeleteObject"),
}
"""Every kind of call of a run: method, path, and what S3 calls it."""

LATER = ("renew", "read HEAD", "read identity", "read manifest", "read blob", "delete")
"""These are met by the second machine, `renew` by the first one when it trains."""


def plan(proxy: FaultProxy, how: str, names: tuple[str, ...]) -> dict[str, Fault]:
    return {name: proxy.fail(*CALLS[name][:2], how) for name in names}


def two_machines(world: World, planned: Mapping[str, str]) -> tuple[dict[str, Fault], list[Bench]]:
    """A run over two machines, with the faults of `planned` at the calls that it names."""
    faults: dict[str, Fault] = {}

    def fail(names: tuple[str, ...]) -> None:
        for name in names:
            if name in planned:
                faults[name] = world.proxy.fail(*CALLS[name][:2], planned[name])

    first, second = world.first, world.machine()
    for machine in (first, second):
        machine.job["checkpoints"] |= {"keep_last": 2}
    fail(tuple(name for name in CALLS if name not in LATER))
    process = first.start(at("step:3", "hold"), at("step:4", "wait"), before=brisk, frozen_bytes=FROZEN)
    first.wait_for(first.waiting(), process)
    first.wait_for(lambda: bool(first.said("commit")), process)
    fail(("renew",))
    first.wait_for(lambda: "renew" not in planned or faults["renew"].met > 0, process)
    process.send(signal.SIGTERM)
    (first.run / "attempts" / "1" / "go").touch()
    code, output = process.finish()
    assert code == 75, output
    fail(LATER[1:])
    code, output = second.train(before=brisk, frozen_bytes=FROZEN, save=1)
    assert code == 0, output
    assert "Traceback" not in output
    return faults, [first, second]


def told(machines: list[Bench]) -> list[str]:
    return [event["message"] for machine in machines for event in machine.said("store")]


def nothing_lost(world: World, undisturbed: str) -> None:
    """The last machine has the weights, `HEAD` moved in one line, and everything that it names is whole."""
    last = world.path / f"machine-{world.machines - 1}" / "runs" / "bench"
    assert (last / "adapter" / "weights").read_text() == undisturbed
    assert world.chain()[-1] == world.head()
    assert world.head().state == "done"
    assert whole(world.store(), world.path)[0] == 6


SAID = {
    "before": "Connection was closed|ConnectionClosed|connect",
    "after": "Connection was closed|ConnectionClosed|connect",
    "409": r"ConditionalRequestConflict \(409\)",
    "500": r"InternalError \(500\)",
    "503": r"SlowDown \(503\)",
    "403 ExpiredToken": r"ExpiredToken \(403\)",
    "400 RequestTimeTooSkewed": r"RequestTimeTooSkewed \(400\)",
}
"""What the events say about each."""


@pytest.mark.parametrize("how", SAID)
def test_fault_at_every_kind_of_call_costs_time_alone(world: World, undisturbed: str, how: str) -> None:
    faults, machines = two_machines(world, dict.fromkeys(CALLS, how))
    assert [name for name, fault in faults.items() if not fault.met] == []
    nothing_lost(world, undisturbed)
    events = told(machines)
    import re

    for name in faults:
        fits = f"{CALLS[name][2]} s3://.*{SAID[how]}"
        assert any(re.search(fits, event) for event in events), (name, events)
