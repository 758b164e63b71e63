"""Computes `x(W + ΔW)ᵀ + b` as one product, for float32 and float64 weights.

A training step takes 2 + 1/K products. W + ΔW is formed one chunk of rows at a time and not kept; the backward forms it
again. x and g are (tokens, features). W is (out_features, in_features), with any strides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels.choice import Kernels, branch_backward
from smoa.maths.kernels.loops import SCRATCH, chunks

MASK_COST = 64
"""Cost of masking one entry, in multiplications of a matrix product (measured: docs/experiment-log.md)."""


def fused_forward(factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x(W + ΔW)ᵀ + b`: (tokens, out_features)."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for chunk, effective in _effective_chunks(factors, weight):
        if bias is None:
            torch.mm(x, effective.T, out=y[:, chunk])
        else:
            torch.addmm(bias[chunk], x, effective.T, out=y[:, chunk])
    return y


def fused_backward(
    factors: Factors,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    needs_x: bool,
    needs_factors: bool,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x(W + ΔW)ᵀ` for x, A and B. Those that are not needed are empty."""
    grad_x, grad_A, grad_B = x.new_empty(0), factors.A.new_empty(0), factors.B.new_empty(0)
    if needs_factors:
        _, grad_A, grad_B = branch_backward(factors, g, x, weight, False, kernels)
    if needs_x:
        grad_x = torch.empty_like(x)
        for chunk, effective in _effective_chunks(factors, weight):
            grad_x.addmm_(g[:, chunk], effective, beta=int(chunk.start > 0))
    return grad_x, grad_A, grad_B


def _effective_chunks(factors: Factors, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows of `W + ΔW = W ⊙ (1 + s·B̃Ã)`, in natural order.

    The product of the scattered factors is zero off the diagonal blocks, at r multiplications per entry. For large r it
    is cheaper to stack the blocks' ranks, at max r_k multiplications per entry, and to mask the result.
    """
    stacked = sum(factors.ranks) - max(factors.ranks) > MASK_COST
    row_major = weight.stride(0) >= weight.stride(1)  # not so for Conv1D; sum in the base layer's order
    wide = factors.wide(weight.dtype)
    spread_a, spread_b = wide.spread_A(stacked), wide.spread_B(stacked)
    row_labels, col_labels, columns = factors.blocks.row_labels, factors.blocks.col_labels, weight.shape[1]
    for chunk in chunks(0, weight.shape[0], columns, weight.device):
        rows = chunk.stop - chunk.start
        if row_major:
            update = torch.mm(spread_b[chunk], spread_a, out=SCRATCH.take("update", rows, columns, weight))
        else:
            update = torch.mm(spread_a.T, spread_b[chunk].T, out=SCRATCH.take("update", columns, rows, weight)).T
        if stacked:
            update.mul_(row_labels[chunk, None] == col_labels)
        yield chunk, torch.addcmul(weight[chunk], weight[chunk], update, out=update)
