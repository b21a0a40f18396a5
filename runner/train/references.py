"""What dpo's reference thinks of the training pairs: log-probabilities that never change, computed once.

A pair's are computed in the first step that needs them, by the forward that TRL would make anyway, and known
from then on: to later epochs, through checkpoints to later attempts, and once a run is through, in the
machine's cache, to other runs over the same model (`runner.supervisor.references` names its file). A
checkpoint holds all that the run knew, so a resume does not depend on what a machine has in its cache.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runner.errors import DataError

KNOWN = "known"
VALUES = "values"
"""Tensors of a checkpoint: bool (N,), and float32 (N, 2) of chosen and rejected, for every training row."""

PAIRS = "pairs"
"""Tensor of the cache beside `VALUES`: uint8 (M, 32), the digest of every pair."""


class References:
    """The table. Every rank holds the same one."""

    def __init__(self, pairs: Sequence[str]) -> None:
        """
        Args:
            pairs: the digest of every training row, by its index.
        """
        self._pairs = list(pairs)
        self._known = torch.zeros(len(pairs), dtype=torch.bool)
        self._values = torch.zeros(len(pairs), 2)

    @property
    def known(self) -> int:
        """How many pairs are known."""
        return int(self._known.sum())

    def knows(self, rows: Iterable[int]) -> bool:
        """Whether all of the rows are known."""
        return bool(self._known[list(rows)].all())

    def of(self, rows: Sequence[int]) -> torch.Tensor:
        """float32 (B, 2): chosen and rejected."""
        return self._values[list(rows)]

    def learn(self, rows: Sequence[int], values: torch.Tensor) -> None:
        """Take values of rows that were not known. One that is not finite, of a step that the float16 loss
        scaler skips, stays unknown.

        Args:
            values: float32 (B, 2).
        """
        finite = torch.isfinite(values).all(dim=1)
        self._values[list(rows)] = values.masked_fill(~finite[:, None], 0)
        self._known[list(rows)] = finite

    # --- with a checkpoint ---

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        return {KNOWN: self._known.clone(), VALUES: self._values.clone()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is no table of these rows.
        """
        known, values = tensors[KNOWN], tensors[VALUES]
        if known.shape != self._known.shape or values.shape != self._values.shape:
            raise ValueError(f"it has {tuple(values.shape)} values for {len(self._pairs)} pairs")
        if known.dtype != torch.bool or not torch.isfinite(values).all():
            raise ValueError("its values are not log-probabilities")
        self._known, self._values = known, values.float()

    # --- with the machine's cache ---

    def look_up(self, file: Path) -> None:
        """Take what other runs left.

        Raises:
            DataError: the file is broken; nothing was taken.
        """
        kept = _read(file)
        for index, pair in enumerate(self._pairs):
            if (value := kept.get(pair)) is not None:
                self.learn([index], value[None])

    def keep(self, file: Path) -> None:
        """Leave what is known to other runs; what they left stays.

        Raises:
            OSError: the disk.
        """
        try:
            kept = _read(file)
        except DataError:
            kept = {}
        kept |= {
            pair: values
            for pair, values, known in zip(self._pairs, self._values, self._known, strict=True)
            if known
        }
        if not kept:
            return
        pairs = torch.tensor([list(bytes.fromhex(pair)) for pair in kept], dtype=torch.uint8)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Containers that share a cache share process ids, too.
        writing = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
        try:
            save_file({PAIRS: pairs, VALUES: torch.stack(list(kept.values()))}, writing)
            writing.replace(file)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            writing.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The values of every pair in a file of the cache, float32 (2,)."""
    try:
        if not file.exists():
            return {}
        tensors = load_file(file)
        names = [bytes(pair).hex() for pair in tensors[PAIRS].tolist()]
        values = tensors[VALUES]
        if values.shape != (len(names), 2) or not torch.isfinite(values).all():
            raise ValueError("its values are not log-probabilities")
        return dict(zip(names, values.float(), strict=True))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: {error}; it is written anew") from error
