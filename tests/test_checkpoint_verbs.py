"""`runner checkpoints`: what a person may do with a run's store, in a folder and in a bucket."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner import checkpoint_verbs, cli
from runner.checkpoint import pull as pulling
from runner.checkpoint.collect import GRACE
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import (
    BLOBS,
    HEAD,
    MANIFESTS,
    PINS,
    TRAINED,
    TTL,
    Entry,
    Head,
    Pin,
    blob_key,
    decode,
    encode,
    manifest_key,
)
from runner.checkpoint.lease import Claim, claim
from runner.checkpoint.pull import Wish, candidates
from runner.checkpoint.restore import restore
from runner.checkpoint.s3 import S3Store, Settings
from runner.checkpoint.store import Patience, Store
from runner.errors import DataError
from tests.fault_proxy import FaultProxy
from tests.runs_in_store import Clock, Run, content, head, overwrite
from tests.s3_server import BUCKET, ENVIRONMENT, s3_server

END = {
    "adapter/adapter_config.json": b'{"r": 8}',
    "adapter/adapter_model.safetensors": b"weights",
    "result.json": b'{"outcome": "done"}',
}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultProxy]:
    with s3_server() as port, FaultProxy(port) as proxy:
        yield proxy


class World:
    """A place for runs, the command line that sees it, and a clock that both share."""

    def __init__(self, kind: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.kind = kind
        self.path = path
        self.clock = Clock()
        self._capsys = capsys
        self._opened: list[Store] = []
        self.proxy: FaultProxy | None = None
        self.above = str(path / "store")
        self.out = ""
        self.err = ""

    @property
    def uri(self) -> str:
        return f"{self.above}/run"

    def store(self, name: str = "run") -> Store:
        if self.kind == "folder":
            return FolderStore(Path(self.above, name))
        prefix = f"{self.above.removeprefix(f's3://{BUCKET}/')}/{name}"
        settings = Settings(bucket=BUCKET, prefix=prefix)
        self._opened.append(S3Store(settings, Patience(60, Clock(), lambda event: None)))
        return self._opened[-1]

    def run(self, name: str = "a", **options: Any) -> Run:
        return Run(self.store(), self.path, self.clock, name, **options).taken()

    def cli(self, *words: str) -> int:
        """Run a verb; its output is in `out` and `err`."""
        code = cli.main(["checkpoints", *words])
        self.out, self.err = self._capsys.readouterr()
        return code

    def close(self) -> None:
        for store in self._opened:
            store.close()


_COUNT = iter(range(1_000_000))


@pytest.fixture(params=["folder", "s3"])
def world(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[World]:
    world = World(request.param, tmp_path, capsys)
    if request.param == "s3":
        world.proxy = request.getfixturevalue("server")
        world.proxy.clear()
        world.above = f"s3://{BUCKET}/runs/{next(_COUNT)}"
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": world.proxy.url}.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(checkpoint_verbs, "BootClock", lambda: world.clock)
    yield world
    world.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> World:
    """A world of folders, for what has nothing to do with the kind of store."""
    world = World("folder", tmp_path, capsys)
    monkeypatch.setattr(checkpoint_verbs, "BootClock", lambda: world.clock)
    return world


def keys(world: World) -> set[str]:
    return set(world.store().keys(""))


ORPHAN = "0" * 64
"""SHA-256 of nothing that anybody has."""


def during(monkeypatch: pytest.MonkeyPatch, world: World, act: Callable[[], object]) -> None:
    """Do something once, just before the next object is fetched."""
    kind: Any = FolderStore if world.kind == "folder" else S3Store
    fetch, met = kind.fetch, []

    def acting(self: Any, key: str, path: Path, size: int) -> str:
        if not met:
            met.append(key)
            act()
        return fetch(self, key, path, size)

    monkeypatch.setattr(kind, "fetch", acting)


def read_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the right to write pins away."""
    if world.proxy is not None:
        world.proxy.fail("PUT", r"/pins/[^/]*", "403 AccessDenied", times=99)
        return
    link = os.link

    def denied(source: Path, target: Path) -> None:
        if "/pins/" in str(target):
            raise OSError(errno.EACCES, "Permission denied")
        link(source, target)

    monkeypatch.setattr(os, "link", denied)


# --- ls ---


def test_ls_of_a_live_run_names_owner_and_checkpoints(world: World) -> None:
    run = world.run()
    for step in (2, 4):
        run.commit(step)
    before = keys(world), head(run.store)
    assert world.cli("ls", world.uri) == 0
    lines = world.out.splitlines()
    assert lines[0] == world.store().place
    assert lines[1] == "held by a on host-a, epoch 1"
    assert lines[2].split() == ["id", "step", "files", "bytes"]
    assert lines[3].split()[:4] == ["head", "00000004-0001", "4", "3"]
    assert lines[4].split()[:3] == ["00000002-0001", "2", "3"]
    assert len({len(line) for line in lines[2:]}) == 1
    assert (keys(world), head(run.store)) == before and world.err == ""


def test_ls_of_a_done_run_as_json(world: World) -> None:
    run = world.run()
    bad, kept = run.commit(2), run.commit(4)
    run.lease.write(lambda head: {"retained": (kept,), "bad": (bad.key,)})
    end = run.finish(4, END)
    assert world.cli("ls", world.uri, "--json") == 0
    told = json.loads(world.out)
    size = sum(len(content(run.store, key)) for key in run.blobs(kept).values())
    row = {"id": kept.id, "step": 4, "key": kept.key, "files": 3, "bytes": size, "problem": None}
    assert told == {
        "place": run.store.place,
        "state": "done",
        "epoch": 1,
        "owner": {"attempt": "a", "host": "host-a", "job": None},
        "checkpoints": [row],
        "final": {**row, "id": end.id, "key": end.key, "bytes": sum(map(len, END.values()))},
        "bad": [bad.key],
    }
    assert world.cli("ls", world.uri) == 0
    table = {line.split()[0]: line.split()[1:3] for line in world.out.splitlines()[3:]}
    assert table == {"head": [kept.id, "4"], "end": [end.id, "4"], "bad": [bad.id, "2"]}


def test_ls_needs_no_right_to_write(world: World) -> None:
    world.run().commit(2)
    if world.proxy is not None:
        world.proxy.clear()
    assert world.cli("ls", world.uri) == 0
    assert world.cli("verify", world.uri) == 0
    if world.proxy is not None:
        assert {method for method, _ in world.proxy.requests} == {"GET"}


def test_ls_says_which_manifest_is_gone(world: World) -> None:
    run = world.run()
    lost, _ = run.commit(2), run.commit(4)
    run.store.delete(lost.key)
    assert world.cli("ls", world.uri) == 0
    assert re.search(rf"{lost.id} +2 +\? +\?", world.out) and f"{lost.key} is missing" in world.err


def test_ls_of_a_place_above_names_the_runs(world: World) -> None:
    for name in ("one", "two"):
        Run(world.store(name), world.path, world.clock).taken()
    assert world.cli("ls", world.above) == 65
    assert "below it are one, two; remedy" in world.err
    assert world.cli("ls", f"{world.above}/three") == 65
    assert "no run is there; remedy: give the address of a run" in world.err


def test_a_run_folder_is_an_address(folder: World) -> None:
    run = Run(FolderStore(folder.path / "runs" / "x" / "checkpoints"), folder.path, folder.clock).taken()
    run.commit(2)
    assert folder.cli("ls", f"{folder.path}/runs/x/") == 0
    assert "00000002-0001" in folder.out
    assert folder.cli("ls", f"{folder.path}/runs") == 65
    assert "below it are x;" in folder.err
    run.store.delete(HEAD)
    assert folder.cli("ls", f"{folder.path}/runs/x") == 65
    assert "adopt" in folder.err


@pytest.mark.parametrize("uri", ["s3://bucket", "gs://bucket/run", "file://x/run"])
def test_an_address_that_leads_nowhere_is_64(folder: World, uri: str) -> None:
    assert folder.cli("ls", uri) == 64
    assert "remedy" in folder.err and "in the job" not in folder.err


@pytest.mark.parametrize(
    ("answer", "code"), [("403 AccessDenied", 77), ("503", 74), ("404 NoSuchBucket", 78)]
)
@pytest.mark.parametrize("verb", [["ls"], ["verify"], ["pull", "--to", "x"], ["gc"], ["rm", "--yes"]])
@pytest.mark.parametrize("world", ["s3"], indirect=True)
def test_a_store_that_cannot_be_read_keeps_its_code(
    world: World, answer: str, code: int, verb: list[str]
) -> None:
    assert world.proxy is not None
    world.run()
    world.proxy.fail("GET", ".*", answer, times=99)
    assert world.cli(*verb, world.uri) == code
    assert "in the job" not in world.err and world.out == ""


def test_missing_and_damaged_head_name_the_remedy(world: World) -> None:
    run = world.run()
    entry = run.commit(2)
    run.store.delete(HEAD)
    for verb in ("ls", "verify", "gc"):
        assert world.cli(verb, world.uri) == 65
        assert f"runner checkpoints adopt {run.store.place}/{entry.key}" in world.err
    run.store.swap(HEAD, b"{", None)
    assert world.cli("ls", world.uri) == 65
    assert "runner checkpoints adopt" in world.err


# --- verify ---


def test_verify_reads_everything_and_counts_orphans(world: World) -> None:
    run = world.run()
    for step in (2, 4):
        run.commit(step)
    run.finish(4, END)
    run.store.create(blob_key(1, ORPHAN, 0), b"x")
    assert world.cli("verify", world.uri) == 0
    assert world.out.count("whole") == 3 and "1 blob and 0 manifests" in world.out
    assert world.cli("verify", world.uri, "--json") == 0
    told = json.loads(world.out)
    assert told["whole"] and told["orphans"] == {"blobs": 1, "manifests": 0} and told["collected"] == []
    assert [one["wrong"] for one in told["checkpoints"]] == [[], [], []]


Harm = Callable[[Store, str], object]


def flip(store: Store, key: str) -> None:
    data = content(store, key)
    overwrite(store, key, data[:-1] + bytes([data[-1] ^ 1]))


def truncate(store: Store, key: str) -> None:
    overwrite(store, key, content(store, key)[:-1])


HARMS: dict[str, Harm] = {"flip": flip, "truncate": truncate, "delete": lambda store, key: store.delete(key)}


@pytest.mark.parametrize(
    ("world", "how"),
    [("folder", "flip"), ("folder", "truncate"), ("folder", "delete"), ("s3", "truncate")],
    indirect=["world"],
)
def test_verify_finds_each_damage(world: World, how: str) -> None:
    run = world.run()
    old, new = run.commit(2), run.commit(4)
    end = run.finish(4, END)
    places = [run.blobs(new)["state"], run.blobs(end)["result.json"], old.key]
    for place in places:
        before = content(run.store, place)
        HARMS[how](run.store, place)
        assert world.cli("verify", world.uri) == 65
        assert f"{run.store.place}/{place}: " in world.out and world.out.count("wrong") == 1
        assert world.cli("verify", world.uri, "--json") == 65
        wrong = [bad for one in json.loads(world.out)["checkpoints"] for bad in one["wrong"]]
        manifest = place.startswith(MANIFESTS)
        problem = "missing" if how == "delete" else "manifest" if manifest else "damaged"
        assert [(bad["key"], bad["problem"]) for bad in wrong] == [(place, problem)]
        assert json.loads(world.out)["orphans"] == (None if manifest else {"blobs": 0, "manifests": 0})
        overwrite(run.store, place, before)
    assert world.cli("verify", world.uri) == 0


def test_verify_of_one_checkpoint(world: World) -> None:
    run = world.run()
    old, new = run.commit(2), run.commit(4)
    flip(run.store, run.blobs(old)["state"])
    assert world.cli("verify", world.uri, "--id", new.id) == 0
    assert world.cli("verify", world.uri, "--id", old.id) == 65
    assert world.cli("verify", world.uri, "--id", "other") == 65
    assert f"remedy: name one that is: {new.id}, {old.id}" in world.err


def collecting(run: Run, clock: Clock, steps: tuple[int, ...]) -> Callable[[], None]:
    """A live run that commits and collects, an hour at once."""

    def act() -> None:
        for step in steps:
            run.commit(step)
        clock.time += GRACE
        assert run.collector.collect()

    return act


def test_what_a_live_run_collects_meanwhile_is_not_wrong(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.run()
    for step in (2, 4):
        run.commit(step)
    during(monkeypatch, world, collecting(run, world.clock, (6,)))
    assert world.cli("verify", world.uri) == 0
    assert "gone   00000002-0001" in world.out and "whole  00000004-0001" in world.out


def test_verify_starts_over_when_all_is_collected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    for step in (2, 4):
        run.commit(step)
    during(monkeypatch, world, collecting(run, world.clock, (6, 8)))
    assert world.cli("verify", world.uri) == 0
    assert re.findall(r"whole  (\S+)", world.out) == ["00000008-0001", "00000006-0001"]


# --- pull ---


def test_pull_gives_the_adapter_of_a_done_run(world: World) -> None:
    run = world.run()
    run.commit(2)
    run.finish(2, END)
    to = world.path / "adapter"
    assert world.cli("pull", world.uri, "--to", str(to)) == 0
    files = {path.name: path.read_bytes() for path in to.iterdir()}
    assert files == {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"weights"}
    assert list(world.store().keys(PINS)) == []
    assert [path.name for path in world.path.iterdir() if path.name.startswith(".")] == []
    assert world.cli("pull", world.uri, "--id", "final", "--checkpoint", "--to", str(to / "all")) == 0
    found = {path.relative_to(to / "all").as_posix() for path in (to / "all").rglob("*") if path.is_file()}
    assert found == set(END)


def test_pull_of_a_run_that_kept_its_best_says_whose_step_it_is(folder: World) -> None:
    run = folder.run()
    run.commit(4)
    run.finish(6, END, {TRAINED: 4})
    assert folder.cli("pull", folder.uri, "--to", f"{folder.path}/best") == 0
    assert folder.out.startswith("adapter of checkpoint final, step 4:")
    to = folder.path / "last"
    assert folder.cli("pull", folder.uri, "--step", "6", "--to", str(to)) == 65
    assert "holds what was best, at step 4, and no checkpoint of step 6 is retained" in folder.err
    assert not to.exists()
    run.finish(4, END, {TRAINED: 2})
    assert folder.cli("pull", folder.uri, "--step", "4", "--to", str(to)) == 65
    assert "checkpoint 00000004-0001" in folder.err  # which holds no adapter here, and not the best's


def test_pull_gives_a_model_after_full_fine_tuning(folder: World) -> None:
    run = folder.run()
    run.finish(2, {"model/model.safetensors": b"weights", "result.json": b"{}"})
    assert folder.cli("pull", folder.uri, "--to", f"{folder.path}/model") == 0
    assert folder.out.startswith("model of checkpoint final")
    assert [path.name for path in (folder.path / "model").iterdir()] == ["model.safetensors"]


def test_pull_gives_checkpoints_as_they_were_committed(world: World) -> None:
    run = world.run()
    run.commit(2)
    run.commit(4)
    for words, step in (([], 4), (["--step", "2"], 2), (["--id", "00000002-0001"], 2)):
        to = world.path / f"pulled {len(words)} {words}"
        assert world.cli("pull", world.uri, *words, "--checkpoint", "--to", str(to)) == 0
        assert (to / "state").read_text() == f"state at {step}"
        assert (to / "checkpoint.json").is_file()
    assert run.lease.renew() is None  # undisturbed


def test_pull_makes_an_adapter_of_a_checkpoint(folder: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.run().commit(4)

    def extract(checkpoint: Path, to: Path) -> None:
        to.mkdir()
        (to / "adapter_model.safetensors").write_bytes((checkpoint / "state").read_bytes())

    monkeypatch.setattr(pulling, "extract", extract)
    assert folder.cli("pull", folder.uri, "--to", f"{folder.path}/x") == 0
    assert (folder.path / "x" / "adapter_model.safetensors").read_text() == "state at 4"


def test_checkpoint_without_an_adapter_is_65(folder: World) -> None:
    folder.run().commit(4)
    assert folder.cli("pull", folder.uri, "--to", f"{folder.path}/x") == 65
    assert "--checkpoint gives all that it has" in folder.err and not (folder.path / "x").exists()


def test_pull_refuses_a_folder_that_is_in_use(folder: World) -> None:
    folder.run().commit(2)
    taken = folder.path / "taken"
    taken.mkdir()
    assert folder.cli("pull", folder.uri, "--checkpoint", "--to", str(taken)) == 0  # an empty one is free
    assert folder.cli("pull", folder.uri, "--checkpoint", "--to", str(taken)) == 64
    assert folder.cli("pull", folder.uri, "--checkpoint", "--to", str(taken / "state")) == 64
    assert folder.cli("pull", folder.uri, "--to", "x", "--id", "a", "--step", "1") == 64


def test_pull_of_what_is_not_there(folder: World) -> None:
    run = folder.run()
    assert folder.cli("pull", folder.uri, "--to", "x") == 65
    assert "no checkpoint yet" in folder.err
    run.commit(2)
    for words in (["--id", "no"], ["--step", "3"]):
        assert folder.cli("pull", folder.uri, "--to", "x", *words) == 65
        assert "name one that it does: 00000002-0001 (step 2)" in folder.err


def test_damaged_checkpoint_costs_the_way_to_the_one_before(world: World) -> None:
    run = world.run()
    old, new = run.commit(2), run.commit(4)
    flip(run.store, run.blobs(new)["state"])
    to = world.path / "to"
    assert world.cli("pull", world.uri, "--checkpoint", "--to", str(to), "--id", new.id) == 65
    assert "SHA-256" in world.err and not to.exists()
    assert world.cli("pull", world.uri, "--checkpoint", "--to", str(to)) == 0
    assert "going back to the checkpoint before" in world.err and old.id in world.out
    assert (to / "state").read_text() == "state at 2"
    flip(run.store, run.blobs(old)["state"])
    assert world.cli("pull", world.uri, "--checkpoint", "--to", str(world.path / "none")) == 65
    assert "no checkpoint in" in world.err


def test_what_a_reader_pinned_stays_until_it_has_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    old = run.commit(2)
    run.commit(4)
    during(monkeypatch, world, collecting_but(run, world.clock, old))
    to = world.path / "to"
    assert world.cli("pull", world.uri, "--step", "2", "--checkpoint", "--to", str(to)) == 0
    assert (to / "state").read_text() == "state at 2" and world.err == ""
    assert list(run.store.keys(PINS)) == []
    world.clock.time += GRACE
    assert old.key in run.collector.collect()


def collecting_but(run: Run, clock: Clock, pinned: Entry) -> Callable[[], None]:
    def act() -> None:
        for step in (6, 8):
            run.commit(step)
        assert pinned not in head(run.store).retained
        clock.time += GRACE
        deleted = run.collector.collect()
        assert pinned.key not in deleted and deleted
        assert set(run.blobs(pinned).values()) <= set(run.store.keys(BLOBS))

    return act


def test_reader_without_the_right_to_pin_starts_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    for step in (2, 4):
        run.commit(step)
    read_only(world, monkeypatch)
    during(monkeypatch, world, collecting(run, world.clock, (6, 8)))
    to = world.path / "to"
    assert world.cli("pull", world.uri, "--checkpoint", "--to", str(to)) == 0
    assert (to / "state").read_text() == "state at 8"
    assert "reading without a pin" in world.err and "starting over" in world.err


def test_reader_that_was_too_late_with_its_pin_looks_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner drops the checkpoint between the reader's look at HEAD and its pin."""
    run = world.run()
    run.commit(2)
    create, acted = type(world.store()).create, []

    def acting(self: Any, key: str, data: bytes) -> bool:
        if key.startswith(PINS) and not acted:
            acted.append(key)
            for step in (4, 6):
                run.commit(step)
        return create(self, key, data)

    monkeypatch.setattr(type(world.store()), "create", acting)
    to = world.path / "to"
    assert world.cli("pull", world.uri, "--checkpoint", "--to", str(to)) == 0
    assert (to / "state").read_text() == "state at 6"
    assert list(run.store.keys(PINS)) == []


def test_pin_is_renewed_under_new_keys(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its old key the same bytes would have the same etag, and look unchanged."""
    run = world.run()
    entry = run.commit(2)
    seen: list[set[str]] = []

    def wait() -> None:
        deadline = time.monotonic() + 30
        while len(set().union(*seen)) < 5:
            seen.append(set(run.store.keys(PINS)))
            assert time.monotonic() < deadline

    during(monkeypatch, world, wait)
    to = world.path / "to"
    done = pulling.pull(world.store(), world.store(), Wish(checkpoint=True), to, print, refresh_every=0.2)
    assert done.pinned and done.entry == entry
    assert all(seen) and max(map(len, seen)) <= 3  # at every moment there is one
    assert list(run.store.keys(PINS)) == []


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(), ["end", "4", "2"]),
        (Wish(checkpoint=True), ["4", "2", "end"]),
        (Wish(id="2"), ["2"]),
        (Wish(step=4), ["end", "4"]),
        (Wish(step=4, checkpoint=True), ["4", "end"]),
        (Wish(id="3"), []),
    ],
)
def test_candidates(wish: Wish, expected: list[str]) -> None:
    def entry(id: str, step: int) -> Entry:
        return Entry(id=id, step=step, key=id, manifest_sha256="")

    body = {"state": "done", "epoch": 1, "owner": {"attempt": "a", "host": "b"}, "seq": 1, "nonce": "n"}
    done = Head.model_validate(
        {**body, "ttl_s": 60, "retained": (entry("4", 4), entry("2", 2)), "final": entry("end", 4)}
    )
    assert [one.id for one in candidates(done, wish)] == expected


# --- gc ---


def orphaned(run: Run) -> set[str]:
    """What killed owners left."""
    left = {blob_key(1, ORPHAN, 0), manifest_key(8, 1, "00000008-0001")}
    for key in left:
        run.store.create(key, b"")
    return left


@pytest.mark.parametrize(
    ("world", "state"), [("folder", "released"), ("folder", "done"), ("s3", "done")], indirect=["world"]
)
def test_gc_deletes_after_the_grace_and_gives_the_run_back(world: World, state: str) -> None:
    run = world.run()
    run.commit(2)
    run.commit(4)
    if state == "done":
        run.finish(4, END)
    else:
        run.lease.release()
    before, left, kept = head(run.store), orphaned(run), keys(world)
    if world.proxy is not None:
        world.proxy.clear()
    assert world.cli("gc", world.uri) == 0
    assert {line.split()[1] for line in world.out.splitlines()[:-1]} == left
    assert "1 blob and 1 manifest that HEAD does not name: deleted in 60 min" in world.err
    assert world.clock.time >= GRACE
    after = head(run.store)
    assert (after.state, after.epoch) == (state, 2)
    assert (after.retained, after.final) == (before.retained, before.final)
    assert keys(world) == kept - left
    if world.proxy is not None:
        states = {decode(Head, one, HEAD).state for one in world.proxy.heads}
        assert states == ({"done"} if state == "done" else {"held", "released"})
        assert len(world.proxy.heads) >= GRACE / TTL
    assert world.cli("verify", world.uri) == 0


def test_gc_without_orphans_waits_for_nothing(world: World) -> None:
    run = world.run()
    run.commit(2)
    run.lease.release()
    assert world.cli("gc", world.uri) == 0
    assert world.out == "0 objects deleted\n" and world.clock.time == 0


def test_gc_refuses_a_live_run_and_takes_over_a_dead_one(world: World) -> None:
    run = world.run()
    run.commit(2)
    left = orphaned(run)
    world.clock.each = run.lease.renew
    assert world.cli("gc", world.uri, "--no-grace") == 76
    assert left <= keys(world) and head(run.store).epoch == 1
    world.clock.each = lambda: None
    assert world.cli("gc", world.uri, "--no-grace") == 0
    assert "held by a on host-a: taken over if that does not renew within 60 s" in world.err
    assert not left & keys(world) and head(run.store).state == "released"


def test_gc_is_stopped_when_somebody_takes_the_run(world: World) -> None:
    run = world.run()
    run.commit(2)
    run.lease.release()
    left = orphaned(run)
    other = Run(world.store(), world.path, Clock(), "b")

    def seize() -> None:
        if world.clock.time > 100:
            world.clock.each = lambda: None
            other.lease.take()

    world.clock.each = seize
    assert world.cli("gc", world.uri) == 76
    assert left <= keys(world) and head(run.store).owner.attempt == "b"


@pytest.mark.parametrize("options", [[], ["--no-grace"]])
def test_gc_keeps_what_a_reader_pinned(folder: World, options: list[str]) -> None:
    run = folder.run()
    pinned = run.commit(2)
    for step in (4, 6):
        run.commit(step)
    run.lease.release()
    left = orphaned(run)
    pin, count = encode(Pin(entry=pinned, ttl_s=600)), iter(range(1000))

    def refresh() -> None:
        for key in list(run.store.keys(PINS)):
            run.store.delete(key)
        run.store.create(f"{PINS}r-{next(count)}.json", pin)

    refresh()
    folder.clock.each = refresh
    assert folder.cli("gc", folder.uri, *options) == 0
    assert not left & keys(folder)
    assert {pinned.key, *run.blobs(pinned).values()} <= keys(folder)


def test_gc_clears_the_pin_of_a_dead_reader(folder: World) -> None:
    run = folder.run()
    pinned = run.commit(2)
    for step in (4, 6):
        run.commit(step)
    run.lease.release()
    run.store.create(f"{PINS}dead.json", encode(Pin(entry=pinned, ttl_s=600)))
    assert folder.cli("gc", folder.uri) == 0
    assert pinned.key not in keys(folder) and f"{PINS}dead.json" not in keys(folder)
    assert f"deleted {PINS}dead.json" in folder.out


def test_gc_with_an_unreadable_manifest_deletes_nothing(world: World) -> None:
    run = world.run()
    damaged, _ = run.commit(2), run.commit(4)
    run.lease.release()
    orphaned(run)
    flip(run.store, damaged.key)
    before = keys(world)
    assert world.cli("gc", world.uri, "--no-grace") == 65
    assert f"runner checkpoints rm {run.store.place} --id ID" in world.err
    assert keys(world) == before and head(run.store).state == "released"
    assert world.cli("rm", world.uri, "--id", damaged.id, "--yes", "--no-grace") == 0
    assert world.cli("verify", world.uri) == 0 and damaged.key not in keys(world)


def test_ctrl_c_while_gc_waits_gives_the_run_back(world: World) -> None:
    run = world.run()
    run.commit(2)
    run.finish(2, END)
    left = orphaned(run)

    def interrupt() -> None:
        raise KeyboardInterrupt

    world.clock.each = interrupt
    assert world.cli("gc", world.uri) == 130
    assert left <= keys(world) and head(run.store).state == "done"


@pytest.mark.parametrize("state", ["released", "done"])
def test_a_run_that_gc_was_killed_in_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A done run stays done, any other is taken over after a ttl."""
    run = world.run()
    run.commit(2)
    if state == "done":
        run.finish(2, END)
    else:
        run.lease.release()
    orphaned(run)
    with monkeypatch.context() as patch:
        kill_at(patch, world, 1)
        with pytest.raises(Killed):
            world.cli("gc", world.uri, "--no-grace")
    later = Run(world.store(), world.path, world.clock, "later")
    assert later.lease.take() == (state == "released")
    assert world.cli("verify", world.uri) == 0


class Killed(BaseException):
    """kill -9, as far as a test in the same process can tell."""


def kill_at(monkeypatch: pytest.MonkeyPatch, world: World, number: int) -> None:
    """End the process at its so manieth deletion, and let it change nothing any more."""
    kind: Any = FolderStore if world.kind == "folder" else S3Store
    delete, swap, met = kind.delete, kind.swap, []

    def killing(self: Any, key: str) -> None:
        if len(met) >= number:
            met.append(key)
            raise Killed
        met.append(key)
        delete(self, key)

    def dead(self: Any, key: str, data: bytes, etag: str | None) -> str | None:
        if len(met) > number:
            raise Killed
        done: str | None = swap(self, key, data, etag)
        return done

    monkeypatch.setattr(kind, "delete", killing)
    monkeypatch.setattr(kind, "swap", dead)


# --- adopt ---


def test_adopt_makes_a_head_of_what_is_whole(world: World) -> None:
    run = world.run(keep_last=9)
    entries = [run.commit(step) for step in (2, 4, 6, 8)]
    run.finish(9, END)
    run.store.create(blob_key(7, "of a zombie", 0), b"")
    run.store.create("events/000009-0.jsonl", b"")
    flip(run.store, run.blobs(entries[1])["state"])
    for harm in (lambda: run.store.delete(HEAD), lambda: overwrite(run.store, HEAD, b"{")):
        harm()
        assert world.cli("adopt", f"{world.uri}/{entries[2].key}") == 0
        assert "epoch 10, released" in world.out and "left out: " in world.err
        after = head(run.store)
        assert (after.state, after.epoch, after.retained) == ("released", 10, (entries[2], entries[0]))
        assert after.final is None
    other = world.run("b")
    found = restore(other.store, other.lease, other.manifests, world.path / "restored", print)
    assert found is not None and found[0].step == 6 and other.lease.head.epoch == 11


def test_adopt_refuses_a_head_that_is_whole(world: World) -> None:
    run = world.run()
    old = run.commit(2)
    run.commit(4)
    uri = f"{world.uri}/{old.key}"
    before = head(run.store)
    assert world.cli("adopt", uri) == 76
    assert "a on host-a owns the run" in world.err
    world.clock.each = run.lease.renew
    assert world.cli("adopt", uri, "--replace") == 76
    world.clock.each = lambda: None
    assert head(run.store).retained == before.retained
    run.finish(4, END)
    assert world.cli("adopt", uri) == 64
    assert "the run done: nothing has to be adopted" in world.err
    assert world.cli("adopt", uri, "--replace") == 0
    after = head(run.store)
    assert (after.state, after.retained, after.final) == ("released", (old,), None)
    assert after.epoch > before.epoch and after.geometry == before.geometry


def test_adopt_refuses_what_is_not_whole(world: World) -> None:
    run = world.run()
    entry = run.commit(2)
    end = run.finish(2, END)
    run.store.delete(HEAD)
    flip(run.store, run.blobs(entry)["state"])
    assert world.cli("adopt", f"{world.uri}/{entry.key}") == 65
    assert "SHA-256" in world.err
    assert world.cli("adopt", f"{world.uri}/{end.key}") == 65
    assert "the end of a run" in world.err
    assert world.cli("adopt", f"{world.uri}/{manifest_key(3, 1, 'x')}") == 65
    assert world.cli("adopt", world.uri) == 64
    overwrite(run.store, manifest_key(7, 1, "y"), content(run.store, entry.key))
    assert world.cli("adopt", f"{world.uri}/{manifest_key(7, 1, 'y')}") == 65
    assert run.store.read(HEAD) is None


def test_adopt_does_not_touch_a_newer_format(folder: World) -> None:
    run = folder.run()
    entry = run.commit(2)
    overwrite(run.store, HEAD, b'{"format": 2}')
    assert folder.cli("adopt", f"{folder.uri}/{entry.key}", "--replace") == 78
    assert content(run.store, HEAD) == b'{"format": 2}'


def test_adopt_yields_to_a_head_that_appears(folder: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder.run()
    entry = run.commit(2)
    whole = content(run.store, HEAD)
    run.store.delete(HEAD)
    during(monkeypatch, folder, lambda: run.store.swap(HEAD, whole, None))
    assert folder.cli("adopt", f"{folder.uri}/{entry.key}") == 76
    assert content(run.store, HEAD) == whole


# --- rm ---


def filled(world: World) -> Run:
    """A released run with everything that a run may have."""
    run = world.run()
    for step in (2, 4):
        run.commit(step)
    orphaned(run)
    for key in ("run.json", "events/000001-0.jsonl", "pins/r.json", "jobs/x.yaml", "parts/x/0.json"):
        run.store.create(key, b"{}")
    run.lease.release()
    return run


@pytest.mark.parametrize(
    ("world", "state"),
    [("folder", "released"), ("folder", "done"), ("folder", "dead"), ("s3", "dead")],
    indirect=["world"],
)
def test_rm_leaves_nothing_of_the_run_and_all_of_others(world: World, state: str) -> None:
    run = filled(world)
    if state == "done":
        run.lease.write(lambda head: {"state": "done"})
    if state == "dead":
        world.run("b")
    below = world.store("run/below")
    Run(below, world.path, world.clock, "c").taken()
    assert world.cli("rm", world.uri) == 64
    assert "--yes" in world.err and "2 checkpoints" in world.err
    assert world.cli("rm", world.uri, "--yes") == 0
    assert world.out.splitlines()[-2] == f"deleted {HEAD}"
    assert keys(world) == {f"below/{HEAD}"}
    assert world.run("d").lease.head.epoch == 1


def test_rm_asks_a_person(folder: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    filled(folder)
    for answer, code in (("no\n", 64), ("", 64), ("yes\n", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert folder.cli("rm", folder.uri) == code
        assert (keys(folder) == set()) == (code == 0)
        assert f"delete the whole run {folder.uri} (released" in folder.err
    assert folder.cli("rm", folder.uri, "--yes") == 65


def test_rm_refuses_a_live_run(world: World) -> None:
    run = filled(world)
    live = world.run("b")
    world.clock.each = live.lease.renew
    before = keys(world)
    assert world.cli("rm", world.uri, "--yes") == 76
    assert world.cli("rm", world.uri, "--id", head(run.store).retained[1].id, "--yes") == 76
    assert keys(world) == before and len(head(run.store).retained) == 2


def test_a_removal_killed_anywhere_is_never_a_run(folder: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a fresh one nor one to go on with; and the next removal finishes it."""
    total = len(keys_of_filled(folder))
    for number in range(total):
        filled(folder)
        with monkeypatch.context() as patch:
            kill_at(patch, folder, number)
            with pytest.raises(Killed):
                folder.cli("rm", folder.uri, "--yes")
        assert len(keys(folder)) == total - number and HEAD in keys(folder)
        later = Run(folder.store(), folder.path, folder.clock, "later")
        with pytest.raises(DataError, match=r"being removed; remedy: runner checkpoints rm .*/run finishes"):
            later.lease.take()
        assert folder.cli("ls", folder.uri) == 0
        assert "being removed by checkpoints-rm" in folder.out
        for verb in ("gc", "pull"):
            assert folder.cli(verb, folder.uri, *(["--to", "x"] if verb == "pull" else [])) == 65
        assert folder.cli("rm", folder.uri, "--yes") == 0
        assert keys(folder) == set()


def keys_of_filled(world: World) -> set[str]:
    filled(world)
    found = keys(world)
    assert world.cli("rm", world.uri, "--yes") == 0
    return found


def test_a_paused_removal_stops_when_another_took_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(world)
    kind: Any = type(world.store())
    delete, met = kind.delete, []

    def pausing(self: Any, key: str) -> None:
        delete(self, key)
        met.append(key)
        if len(met) == 3:
            world.clock.time += TTL
            assert cli.main(["checkpoints", "rm", world.uri, "--yes"]) == 0
            Run(world.store(), world.path, world.clock, "fresh").taken().commit(2)

    monkeypatch.setattr(kind, "delete", pausing)
    assert world.cli("rm", world.uri, "--yes") == 76
    assert world.cli("verify", world.uri) == 0
    assert "00000002-0001" in world.out


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_rm_of_a_run_without_head(world: World, how: str) -> None:
    run = filled(world)
    run.store.delete(HEAD)
    if how == "damaged":
        run.store.swap(HEAD, b"{", None)
    assert world.cli("rm", world.uri) == 64
    assert f"HEAD is {how}" in world.err
    assert world.cli("rm", world.uri, "--yes") == 0
    assert keys(world) == set()


def test_rm_above_runs_touches_none(world: World) -> None:
    filled(world)
    before = keys(world)
    assert world.cli("rm", world.above, "--yes") == 65
    assert "below it are run" in world.err and keys(world) == before


def test_rm_of_one_checkpoint(world: World) -> None:
    run = world.run()
    old, new = run.commit(2), run.commit(4)
    run.lease.release()
    needed = set(run.blobs(new).values())
    assert world.cli("rm", world.uri, "--id", old.id) == 64
    options = ["--no-grace"] if world.kind == "s3" else []
    assert world.cli("rm", world.uri, "--id", old.id, "--yes", *options) == 0
    assert world.clock.time >= (0 if options else GRACE)
    assert head(run.store).retained == (new,) and head(run.store).state == "released"
    assert keys(world) == {HEAD, new.key, *needed}
    assert world.cli("rm", world.uri, "--id", new.id, "--yes") == 64
    assert "the last one" in world.err
    assert world.cli("rm", world.uri, "--id", "no", "--yes") == 65
    end = world.run("b").finish(4, END)
    assert world.cli("rm", world.uri, "--id", end.id, "--yes") == 64
    assert "the end of the run" in world.err and world.cli("verify", world.uri) == 0


# --- the command line ---


@pytest.mark.parametrize("verb", checkpoint_verbs.VERBS)
def test_each_verb_has_help(folder: World, verb: str) -> None:
    assert folder.cli(verb, "--help") == 0
    assert f"usage: runner checkpoints {verb}" in folder.out and f"runner checkpoints {verb} " in folder.out
    assert folder.cli(verb) == 64


def test_verbs_are_listed(folder: World) -> None:
    assert folder.cli("--help") == 0
    assert all(f"  {verb} " in folder.out for verb in checkpoint_verbs.VERBS)
    assert folder.cli() == 64
    assert folder.cli("lst", "x") == 64
    assert "did you mean ls?" in folder.err


# --- the page ---

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text("utf-8")


def test_page_shows_each_verb_as_it_is_typed() -> None:
    lines = re.findall(r"^runner checkpoints (.*)$", PAGE, re.MULTILINE)
    assert [line.split()[0] for line in lines] == list(checkpoint_verbs.VERBS)
    for line in lines:
        parser = argparse.ArgumentParser(exit_on_error=False)
        checkpoint_verbs.VERBS[line.split()[0]].arguments(parser)
        parser.parse_args(line.split()[1:])


@pytest.mark.parametrize("verb", ["ls", "verify"])
def test_page_names_every_key_of_the_json(folder: World, verb: str) -> None:
    run = folder.run()
    damaged = run.commit(2)
    flip(run.store, run.blobs(damaged)["state"])
    run.finish(2, END)
    folder.cli(verb, folder.uri, "--json")
    entry = re.search(rf"^\* \*\*{verb}\*\*.*?(?=^\* )", PAGE, re.MULTILINE | re.DOTALL)
    assert entry is not None
    assert all_keys(json.loads(folder.out)) == set(re.findall(r"`(\w+)`", entry[0])) - {"head", "end"}


def all_keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {*value, *(key for inner in value.values() for key in all_keys(inner))}
    return {key for inner in value for key in all_keys(inner)} if isinstance(value, list) else set()


@pytest.mark.parametrize("world", ["s3"], indirect=True)
@pytest.mark.usefixtures("world")
def test_rules_of_the_page_are_taken_by_a_bucket() -> None:
    import boto3

    rules = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    client = boto3.session.Session().client("s3")
    client.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)
    kept = client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    client.delete_bucket_lifecycle(Bucket=BUCKET)
    client.close()
    assert [set(rule) - {"ID", "Status", "Filter"} for rule in kept] == [
        {"NoncurrentVersionExpiration", "Expiration"},
        {"AbortIncompleteMultipartUpload"},
    ]
    assert "Days" not in kept[0]["Expiration"]


# --- rules ---


@pytest.mark.parametrize(
    ("state", "renewed", "unchanged", "also", "expected"),
    [
        ("done", False, 0, (), Claim.DONE),
        ("done", False, 0, ("done",), Claim.TAKE),
        ("removing", False, 99, (), Claim.GONE),
        ("removing", False, 99, ("done",), Claim.GONE),
        ("removing", True, 99, ("done", "removing"), Claim.LEAVE),
        ("removing", False, 59, ("done", "removing"), Claim.WAIT),
        ("removing", False, 60, ("done", "removing"), Claim.TAKE),
        ("held", True, 99, ("done",), Claim.LEAVE),
        ("released", True, 0, ("done",), Claim.TAKE),
    ],
)
def test_claim_of_maintenance(
    state: str, renewed: bool, unchanged: float, also: tuple[str, ...], expected: Claim
) -> None:
    body = {"epoch": 1, "owner": {"attempt": "a", "host": "b"}, "seq": 1, "nonce": "n", "ttl_s": 60}
    found = Head.model_validate({**body, "state": state})
    assert claim(found, renewed, unchanged, None, also) is expected
