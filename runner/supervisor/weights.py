"""A model's folder and its files of weights: that it has some, how large they are, whether they are here."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from runner.durable import disk
from runner.errors import DataError
from runner.supervisor import hub

INDEX = "model.safetensors.index.json"


class Weights(BaseModel):
    """A model's files of weights."""

    model_config = ConfigDict(frozen=True)

    bytes: int | None
    """Of all of them; None where nobody says."""
    here: bool
    """Whether they are on this machine."""


def check_model(path: str, folder: Path, weights: bool) -> None:
    """Make sure that a folder is a model's.

    Args:
        path: as the job names it.
        weights: whether they have to be there, too.

    Raises:
        DataError: it is none that is loaded here.
    """
    if not (folder / "config.json").is_file():
        raise DataError(
            f"read model {path}: {folder} has no config.json, so it is no model that from_pretrained loads; "
            "remedy: name the folder that holds config.json; an adapter is not a base model"
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise _none(path, folder)


def find_weights(path: str, folder: Path) -> Weights:
    """What is known of a model's weights: from its index, its files, else from the hub's list.

    Args:
        folder: of a hub's model named for the commit.

    Raises:
        DataError: the hub lists none, or the index is none.
    """
    files = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    index = folder / INDEX
    if index.is_file():
        with disk("read the index of the weights", index):
            content = index.read_bytes()
        try:
            document = json.loads(content)
            needed, size = set(document["weight_map"].values()), int(document["metadata"]["total_size"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"read model {path}: {index} is no index of weights; remedy: get the model again"
            ) from error
        return Weights(bytes=size, here=needed <= set(files))
    if files:
        return Weights(bytes=sum(files.values()), here=True)
    listed = hub.weight_sizes(path, folder.name)
    if listed == {}:
        raise _none(path, folder)
    return Weights(bytes=None if listed is None else sum(listed.values()), here=False)


def _none(path: str, folder: Path) -> DataError:
    return DataError(
        f"read model {path}: {folder} has no .safetensors; pickled weights are not loaded, because they "
        "can run code; remedy: use a revision with safetensors, or convert it"
    )
