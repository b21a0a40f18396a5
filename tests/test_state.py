"""The trainer state: what is saved comes back, for real optimizers, as data that cannot execute."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from runner.errors import DataError
from runner.train import rng, state


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
    trained = list(state.trainable(model).values())
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
    state.save(
        folder, model=model, optimizer=optimizer, scheduler=scheduler, scaler=None, data="rows", steps=steps
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_is_the_same_run(name: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = parts(name)
    advance(model, optimizer, scheduler, 5)
    save(tmp_path, model, optimizer, scheduler)
    advance(model, optimizer, scheduler, 5)

    other, other_optimizer, other_scheduler = parts(name)
    state.load_parameters(tmp_path, other)
    state.load_optimizer(tmp_path, model=other, optimizer=other_optimizer, scheduler=other_scheduler)
    state.load_rng(tmp_path)
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
    state.load_optimizer(tmp_path, model=other, optimizer=other_optimizer, scheduler=other_scheduler)
    weight = state.trainable(other)["0.weight"]  # 8,192 elements; under 4,096 bitsandbytes keeps 32 bits
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
