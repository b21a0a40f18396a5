"""bench/bfloat16_blocks.py: what it computes is what PyTorch computes, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import bfloat16_blocks, torch
from torch.nn import functional as F

def made(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 70, 70, dtype=dtype)
    conv = torch.nn.Conv2d(3, 600, 14, 14, dtype=dtype)
    plain, biased = torch.nn.Linear(600, 600, bias=False, dtype=dtype), torch.nn.Linear(600, 300, dtype=dtype)
    seen = conv(x).flatten(2).transpose(1, 2).detach().requires_grad_()
    q = plain(seen).view(2, 25, 4, 150).transpose(1, 2)
    mask = torch.ones(2, 1, 25, 25, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(q, 2 * q, q + 1, attn_mask=mask)
    out = out + F.scaled_dot_product_attention(q, q, q, is_causal=True)
    last = torch.bmm(biased(out.transpose(1, 2).reshape(2, 25, 600)), torch.randn(2, 300, 20, dtype=dtype))
    last.float().square().sum().backward()
    weights = [layer.weight.grad for layer in (plain, biased)]
    return [seen.detach(), out.detach(), last.detach(), seen.grad, biased.bias.grad, *weights]

theirs, exact = made(torch.bfloat16), made(torch.float32)
bfloat16_blocks.install()
for ours, other in zip(made(torch.bfloat16), theirs, strict=True):
    assert ours.dtype == other.dtype == torch.bfloat16 and ours.stride() == other.stride()
    assert (ours - other).abs().max() <= 0.01 * other.abs().max()
for ours, other in zip(made(torch.float32), exact, strict=True):
    assert torch.equal(ours, other)
"""


def test_blocks_compute_what_pytorch_computes_and_leave_float32_alone() -> None:
    """In a process of its own: kernels stay replaced."""
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT / "bench", capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
