"""A PEFT adapter out of a checkpoint, without torch: its parameters under the names that PEFT saves them by.

    <checkpoint>/adapter_config.json         ->   <to>/adapter_config.json          the same bytes
    <checkpoint>/parameters.safetensors      ->   <to>/adapter_model.safetensors    other names, the same data

A safetensors file is eight bytes of length, a JSON header with every tensor's name, type, shape and place,
and the data (https://github.com/huggingface/safetensors, "Format"). Only the header is read as a whole; the
data is copied in pieces. Of an adapter that trained to its last step the file is the export's, byte for byte,
except that values which never trained are not in it: PEFT leaves them as the base model has them. The
checkpoint is taken for whole; `runner.checkpoint.files.verify` finds out.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from runner.checkpoint.files import move
from runner.durable import disk, sync
from runner.errors import DataError, UsageError

CONFIG = "adapter_config.json"
PARAMETERS = "parameters.safetensors"
WEIGHTS = "adapter_model.safetensors"

ADAPTER = "default"
"""PEFT's name of the adapter that trains."""

_PIECE = 1 << 20
"""Bytes copied at once."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package."""


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    begin: int
    """Offset in the data, bytes."""
    end: int


def extract(checkpoint: Path, to: Path) -> None:
    """Write the adapter of a checkpoint folder as a new folder `to`, which appears whole.

    Raises:
        UsageError: `to` is there already.
        DataError: the checkpoint holds no adapter, or one that parameters alone do not make.
        StorageError, AccessDenied: the disk.
    """
    if to.exists():
        raise UsageError(f"extract the adapter: {to} is there already; remedy: name a folder that is not")
    _refuse_incomplete(checkpoint)
    writing = to.with_name(f"{to.name}.partial")
    with disk("extract the adapter", to):
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        shutil.copyfile(checkpoint / CONFIG, writing / CONFIG)
        with (checkpoint / PARAMETERS).open("rb") as source, (writing / WEIGHTS).open("wb") as target:
            _rename(source, target, checkpoint.name)
        for path in (writing / CONFIG, writing / WEIGHTS, writing):
            sync(path)
        move(writing, to)


def saved_name(name: str) -> str:
    """The name that PEFT (0.21.2) saves a parameter of its model by.

    parameter                                              saved as
    q_proj.lora_A.default.weight                           q_proj.lora_A.weight
    q_proj.lora_B.default.bias                             q_proj.lora_B.bias
    q_proj.lora_magnitude_vector.default.weight            q_proj.lora_magnitude_vector
    embed_tokens.lora_embedding_A.default                  embed_tokens.lora_embedding_A
    lm_head.modules_to_save.default.weight                 lm_head.weight
    embed_tokens.token_adapter.trainable_tokens_delta.default
                                                           embed_tokens.token_adapter.trainable_tokens_delta
    q_proj.base_layer.bias                                 q_proj.base_layer.bias
    """
    kept = name.replace(f".modules_to_save.{ADAPTER}.", ".", 1)
    if kept.endswith(f".lora_magnitude_vector.{ADAPTER}.weight"):
        kept = kept.removesuffix(".weight")
    if kept.endswith(f".{ADAPTER}"):
        return kept.removesuffix(f".{ADAPTER}")
    module, _, last = kept.rpartition(".")
    return f"{module.removesuffix(f'.{ADAPTER}')}.{last}"


def _refuse_incomplete(checkpoint: Path) -> None:
    """Whether the parameters and the configuration are all of the adapter.

    no adapter_config.json                     the whole model was trained
    velora_config                              its projections are no parameters
    ensure_weight_tying, modules_to_save       PEFT saves tied weights twice; they are one parameter

    Raises:
        DataError: they are not.
    """
    name, why = checkpoint.name, None
    try:
        with disk(f"read checkpoint {name}", checkpoint):
            config = (
                json.loads((checkpoint / CONFIG).read_bytes()) if (checkpoint / CONFIG).exists() else None
            )
    except ValueError as error:
        raise DataError(f"extract the adapter of checkpoint {name}: {CONFIG} is not JSON: {error}") from error
    if config is None:
        raise DataError(
            f"extract the adapter of checkpoint {name}: it has no {CONFIG}, because the whole model trains; "
            "remedy: let the run go on to its end, which leaves the model in runs/<name>/model"
        )
    if config.get("velora_config"):
        why = "what velora_config projects on is not among its parameters"
    elif config.get("ensure_weight_tying") and config.get("modules_to_save"):
        why = "ensure_weight_tying makes copies that are not among its parameters"
    if why is not None:
        raise DataError(
            f"extract the adapter of checkpoint {name}: {why}; remedy: let the run go on to its end, which "
            "leaves the adapter in runs/<name>/adapter"
        )


def _rename(source: BinaryIO, target: BinaryIO, checkpoint: str) -> None:
    """Copy a safetensors file under PEFT's names, laid out as the safetensors package lays it out."""
    tensors = _header(source, checkpoint)
    data = source.tell()
    # The package sorts by type, then by name; types keep the order that they have in the source.
    types = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    ordered = sorted(tensors, key=lambda tensor: (types.index(tensor.dtype), saved_name(tensor.name)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in ordered:
        after = place + tensor.end - tensor.begin
        offsets = [place, after]
        header[saved_name(tensor.name)] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
        place = after
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        source.seek(data + tensor.begin)
        _copy(source, target, tensor.end - tensor.begin, checkpoint)


def _header(file: BinaryIO, checkpoint: str) -> list[_Tensor]:
    """The tensors of a safetensors file, in the order of their data; `file` is left where that begins.

    Raises:
        DataError: it is no such file.
    """
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length) if length <= _LONGEST_HEADER else b"")
        tensors = [
            _Tensor(name, one["dtype"], one["shape"], *one["data_offsets"])
            for name, one in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"extract the adapter of checkpoint {checkpoint}: {PARAMETERS} is no safetensors file: {error}"
        ) from error
    return sorted(tensors, key=lambda tensor: tensor.begin)


def _copy(source: BinaryIO, target: BinaryIO, size: int, checkpoint: str) -> None:
    while size:
        piece = source.read(min(size, _PIECE))
        if not piece:
            raise DataError(f"extract the adapter of checkpoint {checkpoint}: {PARAMETERS} is cut short")
        target.write(piece)
        size -= len(piece)
