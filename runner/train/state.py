"""The trainer state of a run: one format for every strategy, in safetensors and JSON, nothing that executes.

    parameters.safetensors   every trainable parameter by name, in the precision it trains in
    optimizer.safetensors    tensors of the optimizer's state, `<parameter>/<key>...`
    rng-<rank>.safetensors   tensors of the generators' states of each rank
    state.json               scheduler, loss scaler, the optimizer's and generators' other values, the data
    adapter_config.json      of an adapter: PEFT's, as the export has it (`runner.checkpoint.adapter_file`)
    trainer_state.json       transformers' own TrainerState (step, epoch, log history)
    references.safetensors   under dpo: what its reference is known to think of pairs
    evaluations.json, best.safetensors   of evaluations during training (`runner.train.watch`)
    steps.jsonl              our record: loss, gradient norm, learning rate and row indices of every step

Tensors and other values of a nested state are split by `split` and joined again by `join`. Parameters and
optimizer states are whole and keyed by name (`runner.train.gathering`), so a resume depends neither on the
order of parameters nor on the strategy and the number of processes. A resume does not read
`adapter_config.json`: the job says what it says.

A checkpoint comes from a bucket, and whoever writes there may have made it: whatever a file turns out to be,
it is read as data, and one that is not what a run saves is a `DataError` that names it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from runner.checkpoint import adapter_file
from runner.errors import DataError, RunnerError
from runner.train import rng, tensor_files
from runner.train.gathering import Engine, States, laid_out, trainable
from runner.train.memory import is_out_of_memory
from runner.train.references import References
from runner.train.world import from_all, world

PARAMETERS = adapter_file.PARAMETERS
OPTIMIZER = "optimizer.safetensors"
RNG = "rng-{}.safetensors"
REFERENCES = "references.safetensors"
STATE = "state.json"
STEPS = "steps.jsonl"

_TENSOR = "__tensor__"

_NOT_OURS = (
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What reading a file raises that is something else than what a run saves there."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, as it happened."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over the global batch: of the answers' tokens, in nats, under sft; of the pairs under dpo."""
    grad_norm: float | None
    """L2 norm before clipping; null where it is not finite, which the float16 loss scaler answers."""
    learning_rate: float
    tokens: int
    """Tokens that were not padding."""
    images: int
    rows: list[int]
    """Indices of the rows in the prepared training data, in order."""


def split(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move every tensor of a nested state into `tensors` and leave its key in place; the rest is JSON.

    Raises:
        TypeError: a value that neither safetensors nor JSON holds.
    """
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: prefix}
    if isinstance(tree, dict):
        return {str(key): split(value, f"{prefix}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [split(value, f"{prefix}/{index}", tensors) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{prefix}: a {type(tree).__name__} cannot be saved as data")


def join(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The nested state that `split` took apart; sequences come back as lists."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join(value, tensors) for value in tree]
    return tree


@dataclass(frozen=True)
class Snapshot:
    """The live state of a run, copied to this process, whole."""

    parameters: dict[str, torch.Tensor]
    states: States
    groups: list[dict[str, Any]]
    generators: list[rng.Tree]
    """Of every rank."""


def collect(engine: Engine) -> Snapshot | None:
    """The state as it is, on rank 0; None on the others. Collective. Draws nothing, changes nothing."""
    generators = from_all(rng.capture())
    first = world().first
    parameters = {name: value.cpu().contiguous() for name, value in engine.parameters() if first}
    states = engine.states()
    return Snapshot(parameters, states, engine.groups(), generators) if first else None


def save(
    folder: Path,
    snapshot: Snapshot,
    *,
    model: torch.nn.Module,
    scheduler: Any,
    scaler: Any | None,
    data: str,
    steps: list[Step],
    references: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write everything but transformers' own TrainerState into `folder`.

    Args:
        model: whose adapter's configuration is written, if it has one.
        data: fingerprint of the prepared rows; a resume on other rows is refused.
        scaler: the float16 loss scaler, or null.
        references: what is known of dpo's reference, if it is kept.

    Raises:
        StorageError, AccessDenied: the disk; what was written is removed again.
    """
    tensors: dict[str, torch.Tensor] = {}
    values = {
        "optimizer": {
            "state": {name: split(state, name, tensors) for name, state in snapshot.states.items()},
            "groups": [
                {key: split(value, f"groups/{key}", tensors) for key, value in group.items()}
                for group in snapshot.groups
            ],
        },
        "scheduler": split(scheduler.state_dict(), "scheduler", {}),
        "scaler": None if scaler is None else split(scaler.state_dict(), "scaler", {}),
        "data": data,
    }
    generators: list[dict[str, torch.Tensor]] = [{} for _ in snapshot.generators]
    values["rng"] = [
        split(tree, "rng", held) for tree, held in zip(snapshot.generators, generators, strict=True)
    ]
    with writing(folder):
        save_file(snapshot.parameters, folder / PARAMETERS)
        save_file(tensors, folder / OPTIMIZER)
        if references is not None:
            save_file(references, folder / REFERENCES)
        for rank, held in enumerate(generators):
            save_file(held, folder / RNG.format(rank))
        (folder / STATE).write_text(json.dumps(values))
        (folder / STEPS).write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps))
        if isinstance(model, PeftModel):
            save_adapter_config(folder, model)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, files are written. Half of them would take the room that an outcome needs."""
    try:
        with tensor_files.writing("save a checkpoint", folder):
            yield
    except RunnerError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def save_adapter_config(folder: Path, model: PeftModel) -> None:
    """Write the configuration of the adapter that trains, ready for inference, as `adapter_config.json`.

    PEFT writes sets in hash order, another one in every process; the same run leaves the same bytes.
    """
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def load_parameters(folder: Path, model: torch.nn.Module) -> None:
    """Put the saved values into the model's trainable parameters, in place; DeepSpeed takes them
    before its engine is made.

    Raises:
        DataError: the checkpoint's parameters are not this model's.
    """
    saved, live = _parameters(folder, PARAMETERS, model), trainable(model)
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(laid_out(saved[name], parameter))


def best(file: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What `runner.train.gathering.put` takes of a file of parameters.

    Raises:
        DataError: they are not this model's.
    """
    return _parameters(file.parent, file.name, model)


def _parameters(folder: Path, file: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    saved, live = _tensors(folder, file), trainable(model)
    odd = sorted(saved.keys() ^ live.keys()) or [
        name
        for name, parameter in live.items()
        if saved[name].shape != getattr(parameter, "ds_shape", parameter.shape)
    ]
    if odd:
        raise DataError(
            f"checkpoint {folder.name}: {file}: its parameters are not this model's; the first is {odd[0]}"
        )
    return saved


def load_optimizer(folder: Path, *, engine: Engine, scheduler: Any) -> None:
    """Put the saved moments, steps and learning rates back: moments by name, hyperparameters by group.

    Collective.
    """
    tensors = _tensors(folder, OPTIMIZER)
    values = _values(folder)
    with reading(folder, f"{STATE} or {OPTIMIZER}"):
        saved = values["optimizer"]
        if not isinstance(saved["state"], dict):
            raise TypeError("the optimizer's state is no object")
        states = {name: join(state, tensors) for name, state in saved["state"].items()}
        groups = [
            _hyperparameters(kept, live, tensors)
            for kept, live in zip(saved["groups"], engine.groups(), strict=True)
        ]
        engine.load_states(states, groups)
        if values["scheduler"].keys() != scheduler.state_dict().keys():
            raise ValueError("it is the state of another scheduler")
        scheduler.load_state_dict(values["scheduler"])


def _hyperparameters(kept: Any, live: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    values = join({key: value for key, value in kept.items() if key != "params"}, tensors)
    if sorted(kept["params"]) != sorted(live["params"]):
        raise ValueError("its groups have other parameters")
    return {
        key: tuple(value) if isinstance(live.get(key), tuple) else value  # betas; JSON has no tuples
        for key, value in values.items()
    }


def load_references(folder: Path, references: References) -> None:
    """Know what the saved run knew; nothing, if it kept nothing."""
    if (folder / REFERENCES).exists():
        tensors = _tensors(folder, REFERENCES)
        with reading(folder, REFERENCES):
            references.restore(tensors)


def load_scaler(folder: Path, scaler: Any) -> None:
    """Put the float16 loss scaler back."""
    with reading(folder, STATE):
        saved = _values(folder)["scaler"]
        if saved:
            scaler.load_state_dict(saved)


def load_rng(folder: Path, seed: int) -> None:
    """Put the generators back to where those of this rank were when the checkpoint was saved.

    A rank that the saved run did not have begins with a seed of its own, made of the job's, the step and the
    rank; the same world never comes here.

    Args:
        seed: the job's.
    """
    values, rank = _values(folder), world().rank
    with reading(folder, STATE):
        if not isinstance(values["rng"], list):
            raise TypeError("the generators' states are no list")
        saved = len(values["rng"])
    if rank >= saved:
        step = load_steps(folder)[-1].step
        digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
        set_seed(int.from_bytes(digest[:4], "big"))
        return
    file = RNG.format(rank)
    tensors = _tensors(folder, file)
    with reading(folder, f"{STATE} or {file}"):
        rng.restore(join(values["rng"][rank], tensors))


def load_steps(folder: Path) -> list[Step]:
    """The record of every step up to the checkpoint.

    Raises:
        DataError: it is no such record, or transformers' TrainerState is at another step.
    """
    with reading(folder, STEPS):
        steps = [Step(**json.loads(line)) for line in (folder / STEPS).read_text().splitlines()]
        if [step.step for step in steps] != list(range(1, len(steps) + 1)) or not steps:
            raise ValueError("its steps do not count from 1")
    with reading(folder, TRAINER_STATE_NAME):
        kept = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        if kept.global_step != steps[-1].step or not isinstance(kept.log_history, list):
            raise ValueError(f"it is not at step {steps[-1].step}")
        if not isinstance(kept.train_batch_size, int | None):
            raise ValueError(f"train_batch_size is {kept.train_batch_size!r}")
    return steps


def data_fingerprint(folder: Path) -> str:
    """The fingerprint of the rows that the checkpoint was trained on."""
    with reading(folder, STATE):
        return str(_values(folder)["data"])


@contextlib.contextmanager
def reading(folder: Path, file: str) -> Iterator[None]:
    """Inside, a file is read that somebody else may have written."""
    try:
        yield
    except _NOT_OURS as error:
        if is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise DataError(
            f"checkpoint {folder.name}: {file} is not what a run saves ({said}); remedy: find out who "
            "writes to the run's store, and take this checkpoint out of it"
        ) from error


def _tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    with reading(folder, file):
        tensors: dict[str, torch.Tensor] = load_file(folder / file)
        return tensors


def _values(folder: Path) -> dict[str, Any]:
    with reading(folder, STATE):
        values = json.loads((folder / STATE).read_text())
        if not isinstance(values, dict):
            raise TypeError("it is no object")
        return values
