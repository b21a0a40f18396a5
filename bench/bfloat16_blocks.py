"""Products in bfloat16 on a CPU that has no instructions for them, in minutes instead of hours.

There PyTorch multiplies bfloat16 one number after the other, ninety times slower than float32 (AVX2, torch
2.13). Here matrix products, fused attention and convolutions are computed in float32, a block at a time: what
comes in and goes out is bfloat16 as before, so that a model keeps the same for its backward pass; on top come
10 to 30 MiB for the block at work. For benches of memory, never of time. Not part of the runner.

Called by measured_trainer.py where RUNNER_BENCH_BLOCKS is set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

ROWS, INNER = 256, 512
"""Of a block: its sum is ROWS x m and its factor INNER x m numbers in float32."""

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

Kernel = Callable[..., Any]
"""Of an operator: takes a dispatch key set, and then the operator's arguments."""

_kept: list[torch.library.Library] = []
"""Kernels live as long as their library."""


def wanted() -> bool:
    """Whether oneDNN, which PyTorch asks for products in bfloat16, has none on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def install() -> None:
    """Replace kernels of this process; of tensors that are not bfloat16 PyTorch's own go on."""
    library = torch.library.Library("aten", "IMPL")
    for name, makes in (
        ("mm", _mm),
        ("addmm", _addmm),
        ("bmm", _bmm),
        (ATTENTION, _attention),
        (f"{ATTENTION}_backward", _attention_backward),
        ("_slow_conv2d_forward", _convolution),
    ):
        theirs = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
        with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced
            library.impl(name, _switch(theirs, makes(theirs)), "CPU", with_keyset=True)
    _kept.append(library)


def _switch(theirs: Kernel, ours: Kernel) -> Kernel:
    def kernel(keys: Any, first: torch.Tensor, *others: Any, **named: Any) -> Any:
        chosen = ours if first.dtype == torch.bfloat16 else theirs
        return chosen(keys, first, *others, **named)

    return kernel


def _product(theirs: Kernel, keys: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, k) x (k, m) -> (n, m), bfloat16, summed in float32."""
    made = a.new_empty(a.shape[0], b.shape[1])
    for row in range(0, a.shape[0], ROWS):
        rows = a[row : row + ROWS]
        total = a.new_zeros(rows.shape[0], b.shape[1], dtype=torch.float32)
        for inner in range(0, a.shape[1], INNER):
            block = slice(inner, inner + INNER)
            total += theirs(keys, rows[:, block].float(), b[block].float())
        made[row : row + ROWS] = total
    return made


def _mm(theirs: Kernel) -> Kernel:
    def mm(keys: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _product(theirs, keys, a, b)

    return mm


def _addmm(_: Kernel) -> Kernel:
    theirs = torch.library.get_kernel("aten::mm", "CPU").call_boxed

    def addmm(
        keys: Any, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        return _product(theirs, keys, a, b).mul_(alpha).add_(bias, alpha=beta)

    return addmm


def _bmm(_: Kernel) -> Kernel:
    theirs = torch.library.get_kernel("aten::mm", "CPU").call_boxed

    def bmm(keys: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        for one in range(a.shape[0]):
            made[one] = _product(theirs, keys, a[one], b[one])
        return made

    return bmm


def _apart(tensor: torch.Tensor | None, row: int) -> torch.Tensor | None:
    """A row of a batch, in float32; a mask of one row is that of all."""
    if tensor is None:
        return None
    one = tensor if tensor.shape[0] == 1 else tensor[row : row + 1]
    return one if one.dtype == torch.bool else one.float()


def _attention(theirs: Kernel) -> Kernel:
    def attention(
        keys: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outs, sums = [], []
        for row in range(q.shape[0]):
            one = (_apart(each, row) for each in (q, k, v))
            out, lse = theirs(keys, *one, dropout, causal, attn_mask=_apart(attn_mask, row), scale=scale)
            outs.append(out.to(q.dtype).transpose(1, 2))
            sums.append(lse)
        # Laid out as by PyTorch: heads beside each other.
        return torch.cat(outs).transpose(1, 2), torch.cat(sums)

    return attention


def _attention_backward(theirs: Kernel) -> Kernel:
    def backward(
        keys: Any,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dropout: float,
        causal: bool,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:
        made: list[list[torch.Tensor]] = [[], [], []]
        for row in range(q.shape[0]):
            one = [_apart(each, row) for each in (grad, q, k, v, out, lse)]
            found = theirs(keys, *one, dropout, causal, attn_mask=_apart(attn_mask, row), scale=scale)
            for kept, gradient in zip(made, found, strict=True):
                kept.append(gradient.to(q.dtype))
        return tuple(torch.cat(each) for each in made)

    return backward


def _convolution(theirs: Kernel) -> Kernel:
    def forward(
        keys: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        size: list[int],
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
    ) -> torch.Tensor:
        factor, added = weight.float(), None if bias is None else bias.float()
        made = [
            theirs(keys, image.float(), factor, size, added, stride, padding).to(images.dtype)
            for image in images.split(1)
        ]
        return torch.cat(made)

    return forward
