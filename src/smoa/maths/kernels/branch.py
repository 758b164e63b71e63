"""Computes `x ΔWᵀ` apart from the base layer, by loops over the blocks or by batched products.

Used for bfloat16 and float16 weights, where `W(1 + δ)` would round a small δ away, with dropout, for base layers with a
forward of their own, and wherever it is faster. Both kernels give the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels.batched import batched_backward, batched_delta, batched_forward
from smoa.maths.kernels.block_runs import BlockRun
from smoa.maths.kernels.choice import prefers_batched
from smoa.maths.kernels.loops import loop_backward, loop_delta, loop_forward


def branch_forward(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`x ΔWᵀ`: (tokens, out_features) in the dtype of x. ΔW is formed in float32 or wider."""
    forward = batched_forward if prefers_batched(factors.blocks, len(x)) else loop_forward
    return forward(factors, x, anchor)


def branch_backward(
    factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x ΔWᵀ` for x (empty unless `needs_x`), A and B, from the diagonal blocks of gᵀx."""
    backward = batched_backward if prefers_batched(factors.blocks, len(x)) else loop_backward
    return backward(factors, g, x, anchor, needs_x)


def delta_blocks(factors: Factors, anchor: Tensor, dtype: torch.dtype) -> list[tuple[BlockRun, Tensor]]:
    """The diagonal blocks of ΔW as `branch_forward` forms them, rounded to `dtype`: (blocks, height, width) a run."""
    if prefers_batched(factors.blocks, 1):
        return list(batched_delta(factors.wide(), anchor, dtype))
    return loop_delta(factors, anchor, dtype)
