"""Activations of one stack of transformer layers: bytes of a token, from the widths alone.

The bookkeeping is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1: what each operation of a
layer keeps for its backward pass), done again for today's layers: RMSNorm in float32, grouped queries, gated
MLP, fused attention, which keeps no scores. `c` is the bytes of a number of the computation (`model.dtype`).
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.facts import Stack

FLOAT32 = 4


@dataclass(frozen=True)
class Range:
    """Bytes, at least and at most."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)

    def times(self, other: Range) -> Range:
        """The product, at both ends."""
        return Range(self.low * other.low, self.high * other.high)

    def at_least(self, other: Range) -> Range:
        """The larger of both, at both ends."""
        return Range(max(self.low, other.low), max(self.high, other.high))


NOTHING = Range(0, 0)


def exactly(number: float) -> Range:
    """A range of one value."""
    return Range(number, number)


@dataclass(frozen=True)
class Trained:
    """How a stack trains, as far as its activations depend on it."""

    full: bool
    """Its own weights train; else an adapter on them, or something before it."""
    adapted_inputs: float
    """Input widths of its adapted modules, over all layers."""
    int8: bool
    """8-bit weights keep their inputs outside of autograd, so that checkpointing does not free them
    (bitsandbytes 0.50, `MatMul8bitLt`, `MatMul8bitFp`: `ctx.A = A`)."""
    checkpointing: bool
    gated: bool
    """The MLP has a gate: text models do, towers do not."""
    dropout: bool = False
    """Of LoRA's inputs: a mask of a byte a number on a GPU, float32 on a CPU."""
    scores: float = 0
    """Bytes of attention scores that a token keeps in a layer; 0 with fused attention."""


def inputs(stack: Stack) -> int:
    """Widths of the different inputs of a layer's matrices: attention, its output, the MLP and its output."""
    return 2 * stack.hidden + stack.heads * stack.head_dim + stack.intermediate


def layer(stack: Stack, c: int, how: Trained) -> Range:
    """What one layer keeps of a token for its backward pass.

    operation         keeps
    two norms         input in float32: 4 h each; weights that train: the normalized input, too
    attention         q, k, v, output: with a copy of k and v for every head, or without
    MLP               gate, its activation, up: 3 m c; without a gate, input of the activation: m c
    matrices          their inputs, where the weights train, or are 8-bit; LoRA keeps one for each matrix,
                      or one for those that share it, where autocast makes no copy
    """
    h, q, m = stack.hidden, stack.heads * stack.head_dim, stack.intermediate
    kv = stack.kv_heads * stack.head_dim
    norms = Range(2 * h * (FLOAT32 if how.gated else c), 2 * h * FLOAT32 * (2 if how.full else 1))
    attention = Range(2 * (q + kv) * c, 4 * q * c)
    mlp = exactly((3 if how.gated else 1) * m * c)
    kept = NOTHING
    if how.full or how.int8:
        kept += exactly(inputs(stack) * c)
    if how.adapted_inputs and not how.full:
        each = how.adapted_inputs / stack.layers
        kept += Range(0 if how.int8 else min(each, inputs(stack)) * c, each * c)
        if how.dropout:
            kept += Range(each, each * FLOAT32)
    return norms + attention + mlp + kept + exactly(how.scores)


def backward(stack: Stack, c: int, how: Trained) -> Range:
    """Gradients of a token that live at once while a layer is gone through backward: at least those of the
    MLP's two products, at most those of all of it, beside the residual's and a norm's in float32."""
    m, h = stack.intermediate, stack.hidden
    return Range(2 * m * c, 4 * m * c + 3 * h * FLOAT32 + how.scores)


def trained(stack: Stack, c: int, how: Trained) -> Range:
    """A token's bytes in a stack that gradients pass, at the peak: what all layers keep, and the gradients of
    one; with checkpointing the input of every layer, and one layer as it is computed again."""
    one = layer(stack, c, how)
    if not how.checkpointing:
        return one * stack.layers + backward(stack, c, how)
    residual = Range(stack.hidden * c, stack.hidden * (FLOAT32 if how.full else c))
    stays = exactly(inputs(stack) * c) if how.int8 else NOTHING
    return residual * stack.layers + stays * (stack.layers - 1) + one + backward(stack, c, how)


def passed(stack: Stack, c: int, gated: bool) -> Range:
    """A token's bytes in a stack without autograd: the largest moment of one layer, at most with norms in
    float32 and one copy more of everything."""
    h, m = stack.hidden, stack.intermediate
    products = 3 if gated else 2
    return Range(
        max(products * m + 2 * h, 6 * h) * c,
        max((products + 1) * m + 3 * h, 10 * h) * c + h * FLOAT32,
    )
