"""The state of every random generator that training draws from, as data and as a guard.

Python, NumPy, torch on the CPU and, where there is one, the CUDA device of this process. Nothing here
seeds; `transformers.set_seed` does.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

Tree = dict[str, Any]


def capture() -> Tree:
    """State of all generators: tensors (uint8, uint32 as int64) and plain JSON values."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state: Tree = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": numpy["bit_generator"],
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": numpy["state"]["pos"],
            "has_gauss": numpy["has_gauss"],
            "cached": numpy["gauss"],
        },
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def restore(state: Tree) -> None:
    """Put every generator back to what `capture` returned, on this machine or another.

    A state without `cuda` on a machine with a GPU leaves the GPU's generator alone: it was saved by a run
    that had none, and such a change of hardware cannot be bit-identical anyway.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    np.random.set_state(
        (
            numpy["name"],
            numpy["keys"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside, the generators outside go on as if nothing had been."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
