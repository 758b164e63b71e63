"""Computes `x(W + ΔW)ᵀ + b` on a CPU, where that is exact and faster than `x Wᵀ + x ΔWᵀ`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks
from smoa.maths.factors import Factors
from smoa.maths.kernels.autograd import Gradients
from smoa.maths.kernels.branch import SCRATCH, Branch, plain_branch, rows_of_piece

MIN_TOKENS = 4
"""Tokens for each of K² from which W + ΔW pays, twice as many where the blocks are contiguous (measured:
docs/experiment-log.md)."""
MASK_COST = 64
"""Cost of masking one entry, in multiplications of a matrix product (measured: docs/experiment-log.md)."""


def pays(blocks: Blocks, device_type: str, tokens: int) -> bool:
    """Whether to form W + ΔW, which takes passes over the weight, for so many tokens. Never on a GPU, where each
    operation costs more to start."""
    fewest = MIN_TOKENS * blocks.num_blocks**2 * (2 if blocks.is_contiguous else 1)
    return device_type == "cpu" and tokens >= fewest


class Fused:
    """`x(W + ΔW)ᵀ + b` for x (tokens, in_features) and M = W in float32 or float64, with any strides.

    A training step takes 2 + 1/K products. W + ΔW is formed one chunk of rows at a time and not kept.
    """

    def forward(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        for chunk, effective in _effective_chunks(factors, weight):
            if bias is None:
                torch.mm(x, effective.T, out=y[:, chunk])
            else:
                torch.addmm(bias[chunk], x, effective.T, out=y[:, chunk])
        return y

    def plain(self, factors: Factors, x: Tensor, weight: Tensor) -> Tensor:
        return plain_branch(factors, x, weight) + x @ weight.T

    def backward(self, factors: Factors, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        grad_x, grad_A, grad_B = Branch().backward(factors, g, x, weight, False)
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
    step = rows_of_piece(columns)
    for chunk in (slice(first, first + step) for first in range(0, len(weight), step)):
        rows = len(spread_b[chunk])
        if row_major:
            update = torch.mm(spread_b[chunk], spread_a, out=SCRATCH.take("update", (rows, columns), weight))
        else:
            update = torch.mm(spread_a.T, spread_b[chunk].T, out=SCRATCH.take("update", (columns, rows), weight)).T
        if stacked:
            update.mul_(row_labels[chunk, None] == col_labels)
        yield chunk, torch.addcmul(weight[chunk], weight[chunk], update, out=update)


def computes_exactly(operation: Literal["matmul", "conv"]) -> bool:
    """Whether a CPU's products of float32 matrices, or its convolutions, keep all 24 bits."""
    settings: Any = getattr(torch.backends.mkldnn, operation, None)
    if settings is None:  # before PyTorch 2.9
        return operation == "conv" or torch.get_float32_matmul_precision() == "highest"
    return settings.fp32_precision not in ("tf32", "bf16")
