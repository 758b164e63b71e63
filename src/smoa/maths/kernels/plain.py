"""Computes `x ΔWᵀ` with PyTorch's own operations, for transforms and second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from smoa.maths.factors import Factors


def plain_branch(factors: Factors, x: Tensor, anchor: Tensor | None) -> Tensor:
    """`x ΔWᵀ`: (…, out_features), without modulation if `anchor` is None.

    With an anchor, autograd keeps the K modulated blocks, 1/K of W, and also differentiates the anchor.
    """
    blocks = factors.blocks
    x = blocks.sort_inputs(x)
    anchors = [None] * blocks.num_blocks if anchor is None else blocks.of(anchor)
    scale = factors.scale(factors.B.dtype)
    outputs = []
    for (rows, cols, ranks), entries in zip(factors.slots(), anchors, strict=True):
        block_A, block_B = factors.A[ranks, : cols.stop - cols.start], factors.B[: rows.stop - rows.start, ranks]
        block_B = block_B * scale[ranks]
        if entries is None:
            outputs.append(x[..., cols] @ block_A.T @ block_B.T)
        else:
            outputs.append(x[..., cols] @ (block_B @ block_A * entries).to(x.dtype).T)
    return blocks.unsort_outputs(torch.cat(outputs, dim=-1))
