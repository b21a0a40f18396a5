"""Chaos in short: dozens of kills, a few duels, and planted defects that must be found. `make chaos` is long.

The first test asks for the same kills every time; the second for others every time, and prints their seed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.collect import Collector
from runner.checkpoint.commit import Committer
from runner.checkpoint.files import seal
from runner.checkpoint.folder import FolderStore
from runner.checkpoint.head import Blob, Entry, Head, Manifest, Owner, encode
from runner.checkpoint.lease import Lease
from runner.checkpoint.manifests import Manifests
from runner.checkpoint.store import BootClock, Patience
from runner.supervisor.run_folder import RunFolder
from tests.chaos.observer import forward
from tests.chaos.proxy import Mutation, place_of
from tests.chaos.run import lost
from tests.chaos.verdict import one_line, orderly

ROOT = Path(__file__).parents[1]


def chaos(*arguments: str) -> None:
    if sys.platform != "linux":
        pytest.skip("finds processes in /proc")
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no promise was broken" in done.stdout


def test_sweep_duels_and_planted_defects() -> None:
    chaos("--kills", "16", "--every", "27", "--duels", "3", "--defects", "--seed", "1")


def test_storm_of_another_seed() -> None:
    chaos("--kills", "12", "--every", "0", "--duels", "0")


# --- what the verdict is made of ---

ENTRIES = [Entry(id=f"c{n}", step=n, key=f"checkpoints/{n}", manifest_sha256="") for n in range(4)]
ME, OTHER = Owner(attempt="a", host="h"), Owner(attempt="b", host="h")
HEAD = Head(state="held", epoch=1, owner=ME, seq=1, nonce="1", ttl_s=60, retained=(ENTRIES[1],))


def written(*heads: Head) -> list[Mutation]:
    """Accepted writes, each on the one before."""
    conditions = ["*", *(f"etag-{number}" for number in range(len(heads)))]
    return [
        Mutation("PUT", "HEAD", encode(head), conditions[number], f"etag-{number}")
        for number, head in enumerate(heads)
    ]


def after(head: Head, **changes: Any) -> Head:
    return head.model_copy(update={"seq": head.seq + 1, **changes})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"retained": (ENTRIES[2], ENTRIES[1])}, None),
        ({"epoch": 2, "owner": OTHER}, None),
        ({"state": "done", "final": ENTRIES[3]}, None),
        ({"seq": 3}, "not the next"),
        ({"seq": 1, "nonce": "2"}, "two contents"),
        ({"owner": OTHER}, "new owner"),
        ({"epoch": 2}, "same owner"),
        ({"epoch": 3, "owner": OTHER}, "epoch 1 -> 3"),
        ({"retained": ()}, "the head checkpoint is gone"),
        ({"retained": (ENTRIES[0],)}, "step 1 -> 0"),
        ({"retained": (ENTRIES[3], ENTRIES[2])}, "all at once"),
    ],
)
def test_line_of_heads(change: dict[str, Any], said: str | None) -> None:
    found = one_line(written(HEAD, after(HEAD, **change)))
    assert (found == []) if said is None else any(said in one for one in found)


def test_line_of_heads_breaks_at_a_write_on_another() -> None:
    first, second = written(HEAD, after(HEAD))
    assert "not on etag-0" in one_line([first, replace(second, condition="etag-7")])[0]
    assert "the first HEAD" in one_line([replace(first, condition=None)])[0]


def test_done_is_final() -> None:
    done = after(HEAD, state="done", final=ENTRIES[3])
    assert forward(done, after(done)) == []
    assert forward(done, after(done, state="held")) != []
    assert forward(done, after(done, final=ENTRIES[2])) != []


BLOB = Blob(key="blobs/000001/aa", size=1, sha256="aa")
MANIFEST = Manifest(id="c1", step=1, epoch=1, parent=None, files={"x": BLOB})
WRITES = [
    Mutation("PUT", BLOB.key, condition="*"),
    Mutation("PUT", ENTRIES[1].key, encode(MANIFEST), "*"),
    *written(HEAD),
]


@pytest.mark.parametrize(
    ("writes", "said"),
    [
        (WRITES, None),
        ([*WRITES, Mutation("DELETE", "blobs/000001/bb")], None),
        ([*WRITES, Mutation("DELETE", BLOB.key)], "was deleted, and HEAD names it"),
        ([*WRITES, Mutation("DELETE", ENTRIES[1].key)], "was deleted, and HEAD names it"),
        (WRITES[1:], "which is not written"),
        ([WRITES[0], *WRITES], "written twice"),
        ([*WRITES, Mutation("PUT", "events/1", condition=None)], "without a condition"),
    ],
)
def test_order_of_writes(writes: list[Mutation], said: str | None) -> None:
    found = orderly(writes)
    assert (found == []) if said is None else any(said in one for one in found)


def test_lost_work_is_seen() -> None:
    began = [{"event": "attempt", "attempt": 2, "step": 3}]
    assert lost(began, floor=3) == []
    assert lost(began, floor=4) == ["attempt 2 began at step 3, not 4"]
    here = [{"event": "attempt", "attempt": 1, "step": 0}, {"event": "checkpoint", "step": 4}, *began]
    assert lost(here, floor=0) == ["attempt 2 began at step 3, not 4"]


@pytest.mark.parametrize(
    ("method", "key", "query", "place"),
    [
        ("PUT", "HEAD", "", "PUT HEAD"),
        ("PUT", "checkpoints/00000006-000001-00000006-000001-0001.json", "", "PUT checkpoints"),
        ("PUT", "checkpoints/00000006-000001-final.json", "", "PUT checkpoints of the end"),
        ("PUT", "blobs/000001/ab", "", "PUT blobs"),
        ("PUT", "blobs/000001/ab", "partNumber=2&uploadId=x", "UploadPart"),
        ("POST", "blobs/000001/ab", "uploads", "CreateMultipartUpload"),
        ("POST", "blobs/000001/ab", "uploadId=x", "CompleteMultipartUpload"),
        ("DELETE", "blobs/000001/ab", "uploadId=x", "AbortMultipartUpload"),
        ("GET", "", "list-type=2&prefix=runs%2Fchaos%2Fpins%2F", "LIST pins"),
    ],
)
def test_places(method: str, key: str, query: str, place: str) -> None:
    assert place_of(method, key, query) == place


def test_place_of_the_end() -> None:
    assert place_of("PUT", "HEAD", "", encode(after(HEAD, state="done"))) == "PUT HEAD done"


def test_lock_of_a_killed_supervisor_is_free_soon(tmp_path: Path) -> None:
    """A child between fork and exec holds its parent's lock: chaos found a 76 for a run without an owner."""
    ready, done = os.pipe()
    owner = os.fork()
    if owner == 0:
        with RunFolder(tmp_path / "run").locked():
            if os.fork() == 0:
                os.write(done, b"x")
                time.sleep(0.7)
                os._exit(0)
            signal.pause()
    os.read(ready, 1)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with RunFolder(tmp_path / "run").locked():
        pass


def test_end_is_not_collected(tmp_path: Path) -> None:
    """Chaos found an owner whose first sweep came after its last commit, and took what the run ends with."""
    clock = BootClock()
    store = FolderStore(tmp_path / "store")
    patience = Patience(1, clock, lambda event: None)
    lease = Lease(store, ME, clock, patience)
    manifests = Manifests(store)
    committer = Committer(store, lease, manifests, keep_last=2)
    collector = Collector(store, lease, manifests, committer, clock, grace=0.0)
    assert lease.take()
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "weights").write_text("w")
    entry = committer.finish(seal(tmp_path / "final", id="final", step=6, parent=None, extra={}))
    assert collector.collect() == []
    assert Manifests(store).get(entry) == manifests.get(entry)
    assert [blob.key for blob in manifests.get(entry).files.values() if store.read(blob.key) is None] == []
