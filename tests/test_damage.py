"""What lies in a store is damaged, missing or refused: the checkpoint before it is used, or a clear end.

Each damage meets a run that was stopped after two checkpoints, and the same command goes on with it: here or
on another machine, from a bucket or from a folder. Nothing ever begins again at step 0 because of an error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.commit import SHARED_FROM
from runner.checkpoint.files import read, seal
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import Entry, Head, Manifest, decode, encode
from runner.checkpoint.store import Store
from runner.supervisor import custody
from tests.attempts import merged, run
from tests.machines import Bench, World, at, whole
from tests.s3_server import BUCKET

NEWEST, BEFORE = "00000004-000001-0001", "00000002-000001-0001"

FILES = ("state.json", "state.bin", "checkpoint.json", "frozen.bin")
"""Of a checkpoint; frozen.bin is the same in all of them."""


class Folder:
    """A store in a folder that several machines see, and its objects."""

    def __init__(self, world: World) -> None:
        self.uri = str(world.path / "store")
        self.root = world.path / "store" / "bench"
        self._last = self.root / "HEAD"

    def store(self) -> Store:
        return FolderStore(self.root)

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        self._path(key).write_bytes(data)

    def delete(self, key: str) -> None:
        newest = self._path(key)
        for path in (newest, *self.root.glob("HEAD.*" if key == "HEAD" else key)):
            path.unlink(missing_ok=True)
        self._last = newest

    def _path(self, key: str) -> Path:
        """Of `HEAD` the newest version, or the one that was deleted last."""
        if key != "HEAD":
            return self.root / key
        self._last = max(self.root.glob("HEAD.*"), default=self._last)
        return self._last


class Bucket:
    """The same in a bucket, past the proxy's faults."""

    def __init__(self, world: World) -> None:
        import boto3

        self.world = world
        self.uri = world.uri
        self.client = boto3.session.Session().client("s3")

    def store(self) -> Store:
        return self.world.store()

    def get(self, key: str) -> bytes:
        data = self.world.object(key)
        assert data is not None
        return data

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self.world.key(key), Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=self.world.key(key))


class Stopped:
    """A run that was stopped in step 5, with checkpoints of steps 2 and 4 in its store."""

    def __init__(self, world: World, kind: str, **script: int) -> None:
        self.world = world
        self.objects: Any = Folder(world) if kind == "folder" else Bucket(world)
        first = world.first
        first.job["checkpoints"] = {"uri": self.objects.uri}
        process = first.start(at("step:3", "hold"), at("step:5", "crash:65"), **script)
        first.wait_for(first.waiting(), process)
        first.wait_for(lambda: bool(first.said("commit")), process)
        (first.run / "attempts" / "1" / "go").touch()
        assert process.finish()[0] == 65
        assert [entry.step for entry in self.head().retained] == [4, 2]

    def head(self) -> Head:
        found = self.objects.store().read("HEAD")
        return decode(Head, found.data, "HEAD")

    def entry(self, step: int) -> Entry:
        return next(entry for entry in self.head().retained if entry.step == step)

    def manifest(self, step: int) -> Manifest:
        key = self.entry(step).key
        return decode(Manifest, self.objects.get(key), key)

    def key(self, name: str, step: int = 4) -> str:
        """Of the manifest, or of the object that holds a file."""
        return self.entry(step).key if name == "manifest" else self.manifest(step).files[name].key

    def machine(self, where: str) -> Bench:
        """The same one, or one that knows nothing."""
        if where == "here":
            return self.world.first
        bench = self.world.machine()
        bench.job["checkpoints"] = {"uri": self.objects.uri}
        return bench

    def swap(self, **changes: Any) -> None:
        """Write `HEAD` as somebody would who may write there."""
        found = self.objects.store().read("HEAD")
        old = decode(Head, found.data, "HEAD")
        new = encode(old.model_copy(update={**changes, "seq": old.seq + 1}))
        assert self.objects.store().swap("HEAD", new, found.etag) is not None


def damage(objects: Any, key: str, how: str) -> None:
    data = objects.get(key)
    match how:
        case "flip":
            objects.put(key, data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        case "truncate":
            objects.put(key, data[: len(data) // 2])
        case "delete":
            objects.delete(key)


CASES = [
    (name, how, ("s3", "folder")[number % 2], ("here", "elsewhere")[number // 2 % 2])
    for number, (name, how) in enumerate(
        itertools.product(("manifest", *FILES), ("flip", "truncate", "delete"))
    )
]
"""Every object of a checkpoint in every state, each store and each place in turn."""


@pytest.mark.parametrize(("name", "how", "kind", "where"), CASES)
def test_damaged_object_costs_the_way_to_the_checkpoint_before(
    world: World, undisturbed: str, name: str, how: str, kind: str, where: str
) -> None:
    run = Stopped(world, kind)
    bad = run.entry(4)
    damage(run.objects, run.key(name), how)
    bench = run.machine(where)
    code, output = bench.train()
    assert code == 0, output
    assert f"Going back to checkpoint {BEFORE}, step 2" in output
    assert [event["id"] for event in bench.said("bad")] == [NEWEST]
    assert [event["step"] for event in bench.said("attempt")][-1] == 2
    assert bench.weights() == undisturbed
    head = run.head()
    assert head.bad == (bad.key,)
    assert bad not in head.retained
    # The replay makes the same bytes again; what is rotten must not be taken for them.
    assert whole(run.objects.store(), world.path)[0] == 6


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_file_that_all_checkpoints_share_breaks_all_until_it_is_back(
    world: World, undisturbed: str, kind: str
) -> None:
    run = Stopped(world, kind, frozen_bytes=SHARED_FROM)
    key = run.key("frozen.bin")
    assert key == run.key("frozen.bin", step=2)
    kept = run.objects.get(key)
    damage(run.objects, key, "flip")
    before = run.head()
    for where in ("here", "elsewhere"):
        bench = run.machine(where)
        attempts = len(bench.said("attempt"))
        code, output = bench.train()
        assert code == 65, output
        assert "no checkpoint in" in output and NEWEST in output and BEFORE in output
        assert "bring back what was lost" in output
        assert len(bench.said("attempt")) == attempts
        assert (run.head().retained, run.head().bad) == (before.retained, ())
    run.objects.put(key, kept)
    bench = run.machine("elsewhere")
    code, output = bench.train()
    assert code == 0, output
    assert bench.weights() == undisturbed
    assert whole(run.objects.store(), world.path)[0] == 6


def test_way_back_goes_to_the_first_that_does_not_use_what_is_broken(world: World, undisturbed: str) -> None:
    """All checkpoints after 2 share a file that 2 does not have."""
    run = Stopped(world, "s3")
    damage(run.objects, run.key("state.bin"), "delete")  # so that it goes on from 2, with another file
    first = world.first
    first.job["checkpoints"] |= {"keep_last": 6}
    process = first.start(
        at("step:5", "hold", 2), at("step:6", "crash:65", 2), frozen_bytes=SHARED_FROM + 1, save=1
    )
    first.wait_for(first.waiting(2), process)
    first.wait_for(lambda: run.head().newest.step == 4, process)
    (first.run / "attempts" / "2" / "go").touch()
    assert process.finish()[0] == 65
    steps = [entry.step for entry in run.head().retained]
    assert steps[:2] == [5, 4] and steps[-1] == 2
    damage(run.objects, run.key("frozen.bin", step=5), "truncate")
    code, output = first.train()
    assert code == 0, output
    assert f"Going back to checkpoint {BEFORE}, step 2" in output
    assert first.weights() == undisturbed
    assert whole(run.objects.store(), world.path)[0] == 6


# --- what is refused ---


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/HEAD"), ("GET", r"/run\.json"), ("GET", "list-type=2.*"), ("PUT", ""), ("DELETE", "")],
)
@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId"])
def test_first_call_that_is_refused_is_77_and_nothing_is_done(
    world: World, method: str, path: str, code: str
) -> None:
    """Never read as "nothing is there"; and one right says nothing about another."""
    refused = world.proxy.fail(method, path, f"403 {code}", times=10_000)
    ended, output = world.first.train()
    assert ended == 77, output
    assert refused.met
    assert code in output and "remedy" in output
    assert not (world.first.run / "fetch").exists()
    assert not world.first.said("attempt")
    world.proxy.clear()
    assert world.object("HEAD") is None


# --- the state of the run ---


@pytest.mark.parametrize(("key", "kind"), [("HEAD", "s3"), ("HEAD", "folder"), ("run.json", "s3")])
def test_state_of_the_run_that_is_damaged_is_65_with_a_remedy(
    world: World, undisturbed: str, key: str, kind: str
) -> None:
    run = Stopped(world, kind)
    machines = [run.machine("here"), run.machine("elsewhere")]
    kept = run.objects.get(key)
    attempts = len(world.first.said("attempt"))
    for how in ("flip", "truncate", "delete"):
        damage(run.objects, key, how)
        for bench in machines:
            code, output = bench.train()
            assert code == 65, output
            assert (key in output and "remedy: put it back" in output) or "runner checkpoints adopt" in output
            assert "Traceback" not in output
        run.objects.put(key, kept)
    assert len(world.first.said("attempt")) == attempts
    assert not machines[1].said("attempt")
    code, output = machines[1].train()
    assert code == 0, output
    assert machines[1].weights() == undisturbed


# --- what somebody else wrote there ---


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a\0b", "a\nb", "\ud800", "x" * 256, "state.json/x", "a/" + "y" * 300]
)
def test_manifest_with_a_name_that_is_no_file_of_a_checkpoint_is_left_out(
    world: World, undisturbed: str, name: str
) -> None:
    run = Stopped(world, "folder")
    rewrite(run, lambda document: document["files"].update({name: document["files"]["state.json"]}))
    code, output = run.machine("here").train()
    assert code == 0, output
    assert f"Going back to checkpoint {BEFORE}" in output
    assert "cannot be read as a manifest" in output
    assert world.first.weights() == undisturbed


def rewrite(run: Stopped, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest manifest, and everything that vouches for it."""
    entry = run.entry(4)
    document = json.loads(run.objects.get(entry.key))
    change(document)
    sealed = _sealed(document)
    run.objects.put(entry.key, sealed)
    changed = entry.model_copy(update={"manifest_sha256": hashlib.sha256(sealed).hexdigest()})
    run.swap(retained=(changed, *run.head().retained[1:]))


def _sealed(document: dict[str, Any]) -> bytes:
    """As `encode`, of what no model accepts."""
    body = {key: value for key, value in document.items() if key not in ("format", "sha256")}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({"format": 1, **body, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.mark.parametrize("key", ["../../victim", "/tmp/victim", "blobs/000001/../../../victim"])
def test_key_that_leads_out_of_the_store_is_refused(
    world: World, undisturbed: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """What a manifest names is read, and deleted when nobody needs it any more."""
    run = Stopped(world, "folder")
    victim = world.path / "victim"
    victim.write_bytes(run.objects.get(run.key("state.json")))
    given = key.replace("/tmp/victim", str(victim))
    rewrite(run, lambda document: document["files"]["state.json"].update(key=given))
    code, output = run.machine("here").train()
    assert code == 0, output
    assert f"Going back to checkpoint {BEFORE}" in output
    assert victim.exists()


def test_head_whose_record_is_no_record_is_65(world: World) -> None:
    run = Stopped(world, "folder")
    for record in ({"attempts": "many"}, {"restarts": 5}, {"metrics": [[]]}):
        kept = run.head().record
        run.swap(record=record)
        code, output = run.machine("here").train()
        assert code == 65, output
        assert "record" in output and "remedy" in output
        assert "Traceback" not in output
        run.swap(record=kept)


def test_object_of_somebody_else_is_left_alone(world: World, undisturbed: str) -> None:
    """A folder marker, a note: what is no blob of ours is not garbage."""
    run = Stopped(world, "s3")
    strangers = ("blobs/", "blobs/note.txt", "checkpoints/note.txt", "blobs/x/y")
    for key in strangers:
        run.objects.put(key, b"mine")
    code, output = world.first.train(before=no_grace)
    assert code == 0, output
    assert world.first.weights() == undisturbed
    assert all(run.objects.get(key) == b"mine" for key in strangers)


def no_grace() -> None:
    """In the forked command: what nobody names is deleted at once."""
    custody.GRACE = 0.0


# --- what somebody made to be executed ---


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the real trainer, of the first of two steps."""
    folder = tmp_path_factory.mktemp("real")
    outcome, events = run(folder, TWO_STEPS)
    assert outcome["outcome"] == "done", outcome
    return Path(next(event["path"] for event in events if event["event"] == "checkpoint"))


TWO_STEPS = {"training": {"max_steps": 2}, "checkpoints": {"save_steps": 1}}


def forged(checkpoint: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """The checkpoint with other files, and sealed as if they were right."""
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    before = read(copy)
    (copy / "checkpoint.json").unlink()
    change(copy)
    seal(copy, id=before.id, step=before.step, parent=before.parent, extra=before.extra)
    return copy


def test_pickle_in_place_of_any_file_of_a_checkpoint_executes_nothing(real: Path, tmp_path: Path) -> None:
    """By the real trainer; every kind of content is in tests/test_state.py."""
    mark = tmp_path / "mark"
    names = {path.name for path in real.iterdir()} - {"checkpoint.json"}
    assert len(names) == 7
    bomb = pickle.dumps(Bomb(mark))
    for name in sorted(names):
        folder = tmp_path / name
        folder.mkdir()
        copy = forged(real, folder, lambda copy, name=name: (copy / name).write_bytes(bomb))
        outcome, _ = run(folder / "run", TWO_STEPS, restore=copy)
        assert not mark.exists()
        if name == "adapter_config.json":  # the job says what a resume needs of it
            assert outcome["outcome"] == "done"
            continue
        assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 65), (name, outcome)
        assert f"checkpoint {real.name}: " in outcome["error"] and name in outcome["error"]
        assert "remedy" in outcome["error"]


def test_pickles_beside_the_files_of_a_checkpoint_are_not_read(real: Path, tmp_path: Path) -> None:
    """Under the names that transformers, torch and PEFT would load."""
    mark = tmp_path / "mark"
    names = (
        "training_args.bin",
        "pytorch_model.bin",
        "adapter_model.bin",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
    )

    def add(copy: Path) -> None:
        for name in names:
            (copy / name).write_bytes(pickle.dumps(Bomb(mark)))

    outcome, _ = run(tmp_path / "run", TWO_STEPS, restore=forged(real, tmp_path, add))
    assert outcome["outcome"] == "done", outcome
    assert not mark.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_pickle_in_place_of_a_file_of_an_adapter_executes_nothing(
    real: Path, tmp_path: Path, name: str
) -> None:
    """Given through lora.init_from."""
    mark, adapter = tmp_path / "mark", tmp_path / "adapter"
    shutil.copytree(real.parents[1] / "adapter", adapter)
    (adapter / name).write_bytes(pickle.dumps(Bomb(mark)))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    lora = {"lora": {"init_from": str(adapter)}}
    outcome, _ = run(tmp_path / "run", merged(TWO_STEPS, lora), init_from=str(adapter))
    assert not mark.exists()
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 65), outcome
    assert "lora.init_from" in outcome["error"]


def test_adapter_that_names_a_module_to_import_is_refused(real: Path, tmp_path: Path) -> None:
    """PEFT imports what `megatron_core` says, if it is Megatron's; anything else it refuses."""
    adapter = tmp_path / "adapter"
    shutil.copytree(real.parents[1] / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_config": {"x": 1}, "megatron_core": "evil"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    lora = {"lora": {"init_from": str(adapter)}}
    outcome, _ = run(tmp_path / "run", merged(TWO_STEPS, lora), init_from=str(adapter))
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 65), outcome
    assert "lora.init_from" in outcome["error"] and "security" in outcome["error"]
