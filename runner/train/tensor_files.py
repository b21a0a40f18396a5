"""Writing tensors to a disk that may fail."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from runner.durable import disk


@contextlib.contextmanager
def writing(operation: str, folder: Path) -> Iterator[None]:
    """`runner.durable.disk`, also for what safetensors (0.8) says of a disk: in words alone."""
    with disk(operation, folder):
        try:
            yield
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
