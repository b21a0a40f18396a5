"""Trainable parameters and optimizer state, whole and by name: out of what a strategy made of them, and back.

    single, ddp    they are whole
    fsdp2          every tensor is a DTensor: `full_tensor`, `distribute_tensor`
    zero1, 2, 3    flat partitions: DeepSpeed's `safe_get_full_*` and `safe_set_full_*`

Everything here is collective. On the way out all ranks take part and rank 0 has the values; on the way in
every rank has the values and takes its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from runner.train.world import from_first, world

Named = dict[str, torch.nn.Parameter]
States = dict[str, dict[str, Any]]
"""Of every parameter that has one, by its name: tensors of the parameter's shape, and scalars."""


def trainable(model: torch.nn.Module) -> Named:
    """Parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def everything(model: torch.nn.Module, trainable_only: bool) -> dict[str, torch.Tensor]:
    """A model's state dictionary, whole, on the CPU of rank 0; empty on the others. Collective.

    Args:
        trainable_only: without what is frozen.
    """
    found: dict[str, torch.Tensor] = {}
    tied: dict[int, torch.Tensor] = {}  # what is one tensor stays one, and is written once
    for name, value in model.state_dict(keep_vars=True).items():
        if trainable_only and not value.requires_grad:
            continue
        whole = _full(value.detach()) if not hasattr(value, "ds_id") else _gathered(value)
        if world().first:
            found[name] = tied.setdefault(id(value), whole.cpu())
    return found


def put(values: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Give trainable parameters other values; the optimizer's own copies stay, so training ends here.
    Collective.

    Args:
        values: of every trainable parameter by name, on rank 0; nothing on the others.
    """
    for name, parameter in trainable(model).items():
        value = from_first(values.get(name))  # one at a time: all may be more than a machine has
        assert value is not None
        whole = hasattr(parameter, "ds_id")
        with torch.no_grad(), _modified(parameter) if whole else contextlib.nullcontext():
            parameter.copy_(laid_out(value, parameter))


def _modified(parameter: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, a parameter that ZeRO-3 has partitioned is whole; afterwards it has rank 0's values."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    modified: AbstractContextManager[Any] = GatheredParameters([parameter], modifier_rank=0)
    return modified


def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter that ZeRO-3 has partitioned."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


class Engine(Protocol):
    """What a strategy made of a model and its optimizer."""

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trainable parameter, in the precision that it trains in."""

    def states(self) -> States:
        """What the optimizer keeps for each."""

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: hyperparameters, and `params`, the names of its parameters."""

    def load_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        """Put it back, with the hyperparameters of each group, which come without `params`."""


class Whole:
    """`Engine` of single, ddp and fsdp2."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in trainable(self._model).items():
            yield name, _full(parameter.detach())

    def states(self) -> States:
        state = self._optimizer.state_dict()
        return {
            name: {key: _kept(_full(value)) for key, value in state["state"][index].items()}
            for name, index, _ in self._indices(state)
            if index in state["state"]
        }

    def groups(self) -> list[dict[str, Any]]:
        names = {id(parameter): name for name, parameter in trainable(self._model).items()}
        return [
            {**_hyperparameters(group), "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in self._optimizer.param_groups
        ]

    def load_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        state = self._optimizer.state_dict()
        loaded = {
            index: {key: laid_out(value, parameter) for key, value in states[name].items()}
            for name, index, parameter in self._indices(state)
            if name in states
        }
        kept = [
            {**group, "params": live["params"]}
            for group, live in zip(groups, state["param_groups"], strict=True)
        ]
        self._optimizer.load_state_dict({"state": loaded, "param_groups": kept})

    def _indices(self, state: dict[str, Any]) -> Iterator[tuple[str, int, torch.nn.Parameter]]:
        """Name, index in the optimizer's `state_dict`, and itself, of every parameter."""
        names = {id(parameter): name for name, parameter in trainable(self._model).items()}
        for live, saved in zip(self._optimizer.param_groups, state["param_groups"], strict=True):
            for parameter, index in zip(live["params"], saved["params"], strict=True):
                yield names[id(parameter)], index, parameter


class Zero:
    """`Engine` of DeepSpeed's ZeRO.

    Args:
        optimizer: the one that DeepSpeed was given; it steps on flat partitions of the parameters.
        names: of the parameters of each of its groups, before it was given away.
        sharded: `engine.optimizer`, DeepSpeed's own around it.
        stage: 1, 2 or 3.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        names: list[list[str]],
        sharded: Any,
        stage: int,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._names = names
        self._sharded = sharded
        self._stage = stage

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in trainable(self._model).items():
            yield name, safe_get_full_fp32_param(parameter)

    def states(self) -> States:
        from deepspeed.utils import safe_get_full_optimizer_state

        kept = [state for state in (self._optimizer.state.get(flat) for flat in self._flat) if state]
        if not kept:
            return {}
        keys = [key for key, value in kept[0].items() if torch.is_tensor(value) and value.dim() > 0]
        scalars = {key: value for key, value in kept[0].items() if key not in keys}
        self._link()
        return {
            name: {
                **{key: _kept(value) for key, value in scalars.items()},
                **{key: _kept(safe_get_full_optimizer_state(parameter, key)) for key in keys},
            }
            for name, parameter in trainable(self._model).items()
        }

    def load_states(self, states: States, groups: list[dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for live, group in zip(self._optimizer.param_groups, groups, strict=True):
            live.update(group)
        if not states:
            return
        fused = any(group.get("fused") for group in groups)
        one = next(iter(states.values()))
        for flat in self._flat:
            self._optimizer.state[flat] = {
                key: torch.zeros_like(flat)
                if torch.is_tensor(value) and value.dim() > 0
                # A fused kernel reads the step where the parameters are.
                else _copied(value, flat.device if fused else torch.device("cpu"))
                for key, value in one.items()
            }
        self._link()
        for name, parameter in trainable(self._model).items():
            for key, value in states[name].items():
                if torch.is_tensor(value) and value.dim() > 0:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {**_hyperparameters(group), "params": names}
            for group, names in zip(self._optimizer.param_groups, self._names, strict=True)
        ]

    def _link(self) -> None:
        """Let stages 1 and 2 know the state by parameter. They do so once, after the step of the first group
        (DeepSpeed 0.19), when the others have no state yet."""
        if self._stage < 3:
            self._sharded._hp_optimizer_states_linked = False
            self._sharded._lazy_init_hp_params_optimizer_state()

    @property
    def _flat(self) -> list[torch.Tensor]:
        """The partitions that the optimizer steps on."""
        sharded = self._sharded
        flat: list[torch.Tensor] = (
            sharded.fp32_partitioned_groups_flat
            if self._stage == 3
            else sharded.single_partition_of_fp32_groups
        )
        return flat


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _kept(value: Any) -> Any:
    """Rank 0 keeps a tensor, on the CPU; the others took part. All at once may be more than a GPU has."""
    if not torch.is_tensor(value):
        return value
    return value.cpu() if world().first else None


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """A whole tensor of a parameter's shape, laid out as the parameter is; anything else as it is."""
    if isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _copied(value: Any, where: torch.device) -> Any:
    return value.to(where, copy=True) if torch.is_tensor(value) else value
