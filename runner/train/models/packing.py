"""Rows with a common prefix as one sequence: where every token goes, and who sees whom. Pure.

Rows `a b c | d e` and `a b c | f` with the prefix `a b c` become

    token       a  b  c  d  e  c  f
    position    0  1  2  3  4  2  3     as in its own row
    branch      0  0  1  1  1  2  2     0: the prefix, which all see; else only its own branch does

The prefix's last token stands in every branch, because each predicts another one from it. Attention is causal
inside a branch and from a branch to the prefix, so that every token sees exactly what it sees in its own row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.train.data.sharing import Sharing


@dataclass(frozen=True)
class Packed:
    """R rows of T tokens as S sequences of L."""

    source: torch.Tensor
    """int64 (S, L): the token of the rows, counted through (R, T), that stands there; 0 for padding."""
    real: torch.Tensor
    """bool (S, L): not padding."""
    branch: torch.Tensor
    """int64 (S, L)."""
    target: torch.Tensor
    """int64 (R, T): where a token of the rows stands, counted through (S, L); 0 for padding."""

    @property
    def width(self) -> int:
        return self.source.shape[1]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(..., R, T) -> (..., S, L)."""
        return values.flatten(-2)[..., self.source]

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """(S, L) -> (R, T)."""
        return values.flatten()[self.target]

    def visible(self) -> torch.Tensor:
        """bool (S, 1, L, L): whether the query in a row of it sees the key in a column. Padding sees itself,
        because softmax over nothing is not a number."""
        order = torch.arange(self.width, device=self.source.device)
        causal = order[:, None] >= order[None, :]
        keys, queries = self.branch[:, None, :], self.branch[:, :, None]
        sees = causal & ((keys == 0) | (keys == queries)) & self.real[:, None, :]
        return (sees | torch.eye(self.width, dtype=torch.bool, device=order.device))[:, None]


def pack(sharing: Sharing, width: int, device: torch.device) -> Packed:
    """Lay the rows of a batch out as sequences.

    Args:
        width: T, padding included.
    """
    sources: list[list[int]] = []
    branches: list[list[int]] = []
    places: list[list[int]] = [[0] * width for _ in sharing.shows]
    for one in sharing.sequences:
        shared = max(one.prefix - 1, 0)
        source = [one.rows[0] * width + token for token in range(shared)]
        branch = [0] * shared
        for number, row in enumerate(one.rows, start=1):
            own = range(shared, sharing.lengths[row])
            places[row][: sharing.lengths[row]] = [
                *range(shared),
                *range(len(source), len(source) + len(own)),
            ]
            source += [row * width + token for token in own]
            branch += [number] * len(own)
        sources.append(source)
        branches.append(branch)
    long = max(len(source) for source in sources)
    targets = [[0] * width for _ in sharing.shows]
    for number, one in enumerate(sharing.sequences):
        for row in one.rows:
            length = sharing.lengths[row]
            targets[row][:length] = [number * long + place for place in places[row][:length]]
    padded = [source + [0] * (long - len(source)) for source in sources]
    return Packed(
        source=torch.tensor(padded, device=device),
        real=torch.tensor([[n < len(source) for n in range(long)] for source in sources], device=device),
        branch=torch.tensor([branch + [0] * (long - len(branch)) for branch in branches], device=device),
        target=torch.tensor(targets, device=device),
    )
