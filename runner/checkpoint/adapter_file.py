"""A checkpoint as an adapter folder for PEFT, without torch.

A stand-in: the whole of it comes with the trainer's state.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from runner.errors import DataError


def extract(checkpoint: Path, to: Path) -> None:
    """Make `to` an adapter folder.

    Raises:
        DataError: the checkpoint has no adapter, as in full fine-tuning.
    """
    config = checkpoint / "adapter_config.json"
    if not config.is_file():
        raise DataError("it has no adapter")
    to.mkdir()
    shutil.copyfile(config, to / config.name)
