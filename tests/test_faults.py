"""Runs whose bucket and network fail in every way, at every kind of call: only the time is another.

The supervisor is real, the server is real, and the proxy before it plays the fault. Two machines go through
everything that a run asks of its store: the first begins, commits and is told to stop; the second takes over,
restores, goes on and deletes what is old. Pauses are short, and a time-out is a second.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from tests.fault_proxy import Fault
from tests.machines import Bench, World, at, hasty, whole

PART = 5 << 20
"""S3's smallest, and moto's."""

FROZEN = 2 * PART + 1
"""Bytes of a file that goes in three parts, once."""

TIME_OUT = 1.0


def brisk() -> None:
    """In the forked command: short pauses and time-outs, small parts, and readers get no time."""
    import botocore.config

    from runner.checkpoint import s3, store
    from runner.supervisor import custody

    hasty()
    custody.TTL = 10.0
    store.FIRST_PAUSE, store.LONGEST_PAUSE, custody.GRACE = 0.02, 0.1, 0.0
    s3.Settings = functools.partial(s3.Settings, whole=PART, part=PART)
    config = botocore.config.Config
    botocore.config.Config = lambda **fields: config(**{**fields, "read_timeout": TIME_OUT})


@dataclass(frozen=True)
class Call:
    """One kind of call of a run."""

    method: str
    path: str
    """What its path and query end with."""
    said: str
    """Operation and key, as events name them."""


CALLS = {
    "probe": Call("PUT", r"/probe/\w+/once", r"PutObject \S*/probe/\w+/once:"),
    "unprobe": Call("DELETE", r"/probe/\w+/race", r"DeleteObject \S*/probe/\w+/race:"),
    "take": Call("PUT", "/HEAD", r"PutObject \S*/HEAD:"),
    "identity": Call("PUT", r"/run\.json", r"PutObject \S*/run.json:"),
    "blob": Call("PUT", r"/blobs/[^?]*", r"PutObject \S*/blobs/\S*:"),
    "manifest": Call("PUT", r"/checkpoints/[^?]*", r"PutObject \S*/checkpoints/\S*:"),
    "events": Call("PUT", r"/events/[^?]*", r"PutObject \S*/events/\S*:"),
    "begin parts": Call("POST", r"\?uploads", r"CreateMultipartUpload \S*/blobs/\S*:"),
    "part": Call("PUT", "partNumber=2.*|uploadId=.*partNumber=2", r"UploadPart \S*/blobs/\S*:"),
    "complete parts": Call("POST", r"\?uploadId=[^&]*", r"CompleteMultipartUpload \S*/blobs/\S*:"),
    "list": Call("GET", "list-type=2.*checkpoints.*", r"ListObjectsV2 \S*/checkpoints/:"),
    "renew": Call("PUT", "/HEAD", r"PutObject \S*/HEAD:"),
    "read HEAD": Call("GET", "/HEAD", r"\S*/?HEAD\b"),
    "read identity": Call("GET", r"/run\.json", r"\S*/run.json\b"),
    "read manifest": Call("GET", r"/checkpoints/[^?]*", r"\S*/checkpoints/\S*"),
    "read blob": Call("GET", "/blobs/[^?]*", r"\S*/blobs/\S*"),
    "delete": Call("DELETE", "/checkpoints/[^?]*", r"DeleteObject \S*/checkpoints/\S*:"),
}

READS = ("read HEAD", "read identity", "read manifest", "read blob")
LATER = ("renew", *READS, "delete")
"""Met by the second machine; `renew` by the first, when it trains."""


def two_machines(world: World, planned: Mapping[str, str]) -> tuple[dict[str, Fault], list[Bench]]:
    """A run over two machines, with the faults of `planned` at the calls that it names."""
    faults: dict[str, Fault] = {}

    def fail(names: tuple[str, ...]) -> None:
        for name in names:
            if name in planned:
                faults[name] = world.proxy.fail(CALLS[name].method, CALLS[name].path, planned[name])

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


def seen(faults: Mapping[str, Fault], machines: list[Bench], how: str) -> None:
    """Every fault was met, and is in some machine's events by its operation, key and reason."""
    assert [name for name, fault in faults.items() if not fault.met] == []
    events = [event["message"] for machine in machines for event in machine.said("store")]
    hidden = [
        name for name in faults if not any(re.search(f"{CALLS[name].said}.*{how}", event) for event in events)
    ]
    assert hidden == [], events


CUT = "Connection was closed|[Cc]onnection (reset|broken|aborted)"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("before", CUT),
        ("after", CUT),
        ("409", r"ConditionalRequestConflict \(409\)"),
        ("500", r"InternalError \(500\)"),
        ("503", r"SlowDown \(503\)"),
        ("403 ExpiredToken", r"ExpiredToken \(403\)"),
    ],
    ids=lambda value: value if value.isalnum() else "",
)
def test_fault_at_every_kind_of_call_costs_time_alone(
    world: World, undisturbed: str, how: str, reason: str
) -> None:
    faults, machines = two_machines(world, dict.fromkeys(CALLS, how))
    nothing_lost(world, undisturbed)
    seen(faults, machines, reason)


@pytest.mark.parametrize("how", ["truncate", "long"])
def test_answer_that_ends_early_is_asked_for_again(world: World, undisturbed: str, how: str) -> None:
    """In the middle, or one byte before its Content-Length."""
    faults, machines = two_machines(world, dict.fromkeys(READS, how))
    nothing_lost(world, undisturbed)
    seen(faults, machines, "")


def test_answer_with_another_byte_is_asked_for_again(world: World, undisturbed: str) -> None:
    """What a checkpoint is made of is compared with its SHA-256, the rest makes no sense."""
    faults, machines = two_machines(world, dict.fromkeys(READS, "corrupt"))
    nothing_lost(world, undisturbed)
    seen(faults, machines, "(cannot be read as|not the manifest|SHA-256)")


def test_stalled_answer_is_not_waited_for(world: World, undisturbed: str) -> None:
    stalled = ("take", "blob", "part", "complete parts", "renew", "read HEAD", "read blob")
    faults, machines = two_machines(world, dict.fromkeys(stalled, f"{2 * TIME_OUT}s"))
    nothing_lost(world, undisturbed)
    seen(faults, machines, "Read timeout")


def test_token_that_expires_is_replaced_in_the_file_and_the_run_goes_on(
    world: World, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls of the old key are refused until the file has a new one, as when a role's hour is over."""
    keys = world.path / "credentials"

    def write(key: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    write("OLDKEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    first = world.first
    process = first.start(at("step:3", "hold"), before=brisk)
    first.wait_for(first.waiting(), process)
    for method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
        world.proxy.fail(method, "", "400 ExpiredToken", times=10_000, key="OLDKEY")
    (first.run / "attempts" / "1" / "go").touch()
    first.wait_for(lambda: len(first.said("store")) > 5, process)
    assert process.poll() is None
    write("NEWKEY")
    code, output = process.finish()
    assert code == 0, output
    assert first.weights() == undisturbed
    assert all("ExpiredToken" in event["message"] for event in first.said("store"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    nothing_lost(world, undisturbed)


def test_object_that_the_server_stored_wrong_costs_the_way_to_the_one_before(
    world: World, undisturbed: str
) -> None:
    """The server takes the body for what its checksum says, and it is not."""
    first, second = world.first, world.machine()
    process = first.start(at("step:3", "hold"), at("step:5", "wait"), before=brisk)
    first.wait_for(first.waiting(), process)
    first.wait_for(lambda: bool(first.said("commit")), process)
    rot = world.proxy.fail("PUT", "/blobs/[^?]*", "rot")
    (first.run / "attempts" / "1" / "go").touch()
    first.wait_for(lambda: len(first.said("commit")) > 1, process)
    assert rot.met
    os.kill(process.pid, signal.SIGKILL)
    code, output = second.train(before=hasty)
    assert code == 0, output
    bad = second.said("bad")
    assert [one["id"] for one in bad] == ["00000004-000001-0001"]
    assert "has SHA-256" in bad[0]["reason"]
    assert "Going back to checkpoint 00000002-000001-0001, step 2" in output
    assert len(world.head().bad) == 1
    nothing_lost(world, undisturbed)


def test_identity_that_the_server_stored_wrong_is_known_before_the_first_step(world: World) -> None:
    """It is written once and nothing can replace it: later the checkpoints would belong to nothing."""
    rot = world.proxy.fail("PUT", r"/run\.json", "rot")
    code, output = world.first.train(before=brisk)
    assert (rot.met, code) == (1, 65), output
    assert "run.json: cannot be read as the identity of a run" in output
    assert world.first.said("attempt") == [] and world.head().newest is None
