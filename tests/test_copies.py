"""A checkpoint comes to machines that do not have it: three ranks on two machines, over gloo."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from runner.plan import Plan
from tests.attempts import FORKS, planned

PLACES = ((0, 1), (0, 2), (1, 2))
"""Local rank and local size of each."""


def bring(plan: Plan, rank: int, port: int) -> None:
    """In a forked process: what an attempt does first. Leaves the path that it would read."""
    from runner.train import copies
    from runner.train.world import joined

    local_rank, local_size = PLACES[rank]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(PLACES)), "LOCAL_RANK": str(local_rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    copies.PIECE = 1000
    if local_size == 2:
        plan = plan.model_copy(update={"restore": Path("/nowhere", "00000002-000001-0001")})
    with joined():
        restore = copies.brought(plan).restore
    (plan.run_dir / f"read-{rank}").write_text(str(restore))


def test_a_checkpoint_comes_to_a_machine_that_does_not_have_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "newest" / "00000002-000001-0001"
    checkpoint.mkdir(parents=True)
    content = {"a.safetensors": os.urandom(2500), "b.json": b"{}", "empty": b"", "piece": bytes(1000)}
    for name, data in content.items():
        (checkpoint / name).write_bytes(data)
    plan = planned(tmp_path, {}, restore=checkpoint)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [FORKS.Process(target=bring, args=(plan, rank, port)) for rank in range(len(PLACES))]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(60)
    assert [one.exitcode for one in ranks] == [0, 0, 0]
    copy = plan.attempt_dir / "restored" / checkpoint.name
    read = [Path((tmp_path / f"read-{rank}").read_text()) for rank in range(len(PLACES))]
    assert read == [checkpoint, copy, copy]
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == content


def test_one_machine_has_it_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.train.copies import brought

    plan = planned(tmp_path, {}, restore=tmp_path / "newest" / "1")
    assert brought(plan) is plan
    places = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert brought(plan) is plan
