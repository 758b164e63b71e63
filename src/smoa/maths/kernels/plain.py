"""Computes `x ΔWᵀ` with PyTorch's own operations: without modulation, for transforms, and in compiled models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoa.maths.factors import Factors
from smoa.maths.kernels.block_runs import runs_of


def plain_branch(factors: Factors, x: Tensor, anchor: Tensor | None) -> Tensor:
    """`x ΔWᵀ`: (…, out_features), without modulation if `anchor` is None.

    With an anchor, autograd keeps the K modulated blocks, 1/K of W, and also differentiates the anchor.
    """
    blocks, flat = factors.blocks, x.reshape(-1, x.shape[-1])
    sorted_x, outputs = blocks.sort_inputs(flat), []
    wide = factors.wide(factors.B.dtype if anchor is None else None)
    for run in runs_of(factors):
        inputs, A, B = run.of_inputs(sorted_x), run.of_A(wide.A), run.of_B(wide.B)
        delta = None if anchor is None else (B @ A * run.of_matrix(anchor, blocks)).to(x.dtype)
        y = inputs @ A.mT @ B.mT if delta is None else inputs @ delta.mT
        outputs.append(y.transpose(0, 1).reshape(len(flat), run.count * run.height))
    return blocks.unsort_outputs(torch.cat(outputs, dim=-1)).view(*x.shape[:-1], blocks.out_features)


def recomputed_branch(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`plain_branch` for a compiled model: the backward computes the blocks of ΔW again instead of keeping them.

    A compiler fuses gathers, products with M, scales and casts, which it could not do inside an operator. Without the
    checkpoint it would keep the blocks (measured: docs/experiment-log.md).
    """
    if not torch.is_grad_enabled():
        return plain_branch(factors, x, anchor)
    y: Tensor = checkpoint(plain_branch, factors, x, anchor, use_reentrant=False, preserve_rng_state=False)
    return y
