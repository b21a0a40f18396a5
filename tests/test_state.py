"""The trainer state: what is saved comes back, for real optimizers, as data that cannot execute."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from transformers import TrainerState

from runner.errors import DataError
from runner.train import gathering, rng, state


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 64))
    model[0].bias.requires_grad_(False)
    return model


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adamw_bnb_8bit": lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-2),
}


def parts(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = network()
    trained = list(gathering.trainable(model).values())
    optimizer = OPTIMIZERS[name](
        [{"params": trained[:1], "weight_decay": 0.1}, {"params": trained[1:]}, {"params": []}]
    )
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        loss = torch.nn.functional.dropout(model(torch.randn(8, 128)), 0.5).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    steps = [state.Step(1, 0.5, None, 1e-2, 10, 2, [3, 4])]
    snapshot = state.collect(gathering.Whole(model, optimizer))
    assert snapshot is not None
    state.save(folder, snapshot, model=model, scheduler=scheduler, scaler=None, data="rows", steps=steps)
    TrainerState(global_step=1).save_to_json(str(folder / "trainer_state.json"))


def load(folder: Path) -> None:
    """Everything that a resume reads."""
    model, optimizer, scheduler = parts("adamw")
    state.load_steps(folder)
    state.data_fingerprint(folder)
    state.load_parameters(folder, model)
    state.load_optimizer(folder, engine=gathering.Whole(model, optimizer), scheduler=scheduler)
    state.load_scaler(folder, torch.amp.GradScaler("cpu"))
    state.load_rng(folder, 3)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def header(content: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header and nothing else."""
    return (len(content) if length is None else length).to_bytes(8, "little") + content


def changed(file: Path, key: str, value: Any) -> bytes:
    """A JSON object with another value at a dotted key."""
    document = json.loads(file.read_text())
    node = document
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    return json.dumps(document).encode()


TENSORS = ("parameters.safetensors", "optimizer.safetensors", "rng-0.safetensors")
VALUES = ("state.json", "trainer_state.json", "steps.jsonl")
HOSTILE: dict[str, Callable[[Path, Path], bytes]] = {
    "pickle": lambda file, mark: pickle.dumps(Bomb(mark)),
    "torch.save": lambda file, mark: saved_by_torch(Bomb(mark)),
    "nothing": lambda file, mark: b"",
    "a list": lambda file, mark: b"[1]",
    "a number": lambda file, mark: b"7",
    "a deep one": lambda file, mark: b"[" * 100_000,
    "a long number": lambda file, mark: b"9" * 10_000,
    "an absurd length": lambda file, mark: header(b"{}", 1 << 62),
    "an absurd shape": lambda file, mark: header(
        b'{"0.weight":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'
    ),
    "no tensors": lambda file, mark: header(b"{}      "),
}


def saved_by_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [*TENSORS, *VALUES])
def test_file_that_is_something_else_is_named_and_never_executed(tmp_path: Path, name: str) -> None:
    for kind, content in HOSTILE.items():
        folder, mark = tmp_path / kind, tmp_path / "mark"
        folder.mkdir()
        model, optimizer, scheduler = parts("adamw")
        advance(model, optimizer, scheduler, 1)
        save(folder, model, optimizer, scheduler)
        load(folder)
        (folder / name).write_bytes(content(folder / name, mark))
        with pytest.raises(DataError, match=rf"checkpoint {kind}: .*({name}|its parameters)"):
            load(folder)
        assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("state.json", "optimizer", None),
        ("state.json", "optimizer.groups", 5),
        ("state.json", "optimizer.state", [[]]),
        ("state.json", "scheduler", {"step": 1}),
        ("state.json", "scheduler", None),
        ("state.json", "scaler", 3),
        ("state.json", "rng", {}),
        ("state.json", "rng.0.python.words", ["x"] * 625),
        ("state.json", "rng.0.python.words", [10**30] * 625),
        ("state.json", "rng.0.cpu", {"__tensor__": "../../x"}),
        ("state.json", "rng.0.numpy.name", "__import__"),
        ("trainer_state.json", "global_step", 3),
        ("trainer_state.json", "global_step", "1"),
        ("trainer_state.json", "train_batch_size", "8"),
        ("trainer_state.json", "log_history", 4),
        ("trainer_state.json", "__class__", {}),
        ("steps.jsonl", "step", 2),
        ("steps.jsonl", "step", None),
        ("steps.jsonl", "__class__", 2),
    ],
)
def test_value_of_another_type_is_named(tmp_path: Path, name: str, key: str, value: Any) -> None:
    save(tmp_path, *parts("adamw"))
    (tmp_path / name).write_bytes(changed(tmp_path / name, key, value))
    with pytest.raises(DataError, match=f"{name}.*is not what a run saves"):
        load(tmp_path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_is_the_same_run(name: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = parts(name)
    advance(model, optimizer, scheduler, 5)
    save(tmp_path, model, optimizer, scheduler)
    advance(model, optimizer, scheduler, 5)

    other, other_optimizer, other_scheduler = parts(name)
    state.load_parameters(tmp_path, other)
    state.load_optimizer(tmp_path, engine=gathering.Whole(other, other_optimizer), scheduler=other_scheduler)
    state.load_rng(tmp_path, 3)
    advance(other, other_optimizer, other_scheduler, 5)

    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert other_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert state.load_steps(tmp_path)[0].rows == [3, 4]


def test_eight_bit_states_stay_eight_bit(tmp_path: Path) -> None:
    model, optimizer, scheduler = parts("adamw_bnb_8bit")
    advance(model, optimizer, scheduler, 1)
    save(tmp_path, model, optimizer, scheduler)
    other, other_optimizer, other_scheduler = parts("adamw_bnb_8bit")
    state.load_optimizer(tmp_path, engine=gathering.Whole(other, other_optimizer), scheduler=other_scheduler)
    weight = gathering.trainable(other)["0.weight"]  # 8,192 elements; under 4,096 bitsandbytes keeps 32 bits
    assert other_optimizer.state[weight]["state1"].dtype is torch.uint8


def test_nothing_in_a_state_can_execute(tmp_path: Path) -> None:
    save(tmp_path, *parts("adamw"))
    for file in tmp_path.iterdir():
        assert file.suffix in {".safetensors", ".json", ".jsonl"}
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, *parts("adamw"))
    with pytest.raises(DataError, match="not this model's"):
        state.load_parameters(tmp_path, torch.nn.Linear(3, 3))


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer/x"):
        state.split({"x": object()}, "optimizer", {})


def test_generators_come_back_and_a_guard_leaves_them_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.gauss(0, 1)  # leaves a second value in Python's generator
    saved = rng.capture()
    drawn = draw()
    rng.restore(saved)
    assert draw() == drawn
    rng.restore(saved)
    with rng.preserved():
        draw()
    assert draw() == drawn
