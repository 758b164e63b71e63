r"""Computes `x ΔWᵀ` of one small matrix with all its blocks at once, in a few batched products.

For the matrices of a stack, each of which few rows of x belong to: there, `branch`'s loop over chunks takes longer to
start its operations than to run them. The formulas are those of `branch`. Blocks are padded to the size of the largest,
and the padding of the anchors is zero, so that it adds nothing to outputs and gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks, slices
from smoa.maths.factors import Factors
from smoa.maths.kernels.loops import product_dtype


class _Padded(NamedTuple):
    """Coordinates of one side by block: int (K·size,), and where each coordinate is in that order."""

    order: Tensor
    place: Tensor
    size: int
    smaller: int
    """From this block on, the last coordinate is padding."""


def _pad(order: Tensor, inverse: Tensor, num_blocks: int) -> _Padded:
    size, smaller = -(-len(order) // num_blocks), len(order) % num_blocks or num_blocks
    if smaller == num_blocks:
        return _Padded(order, inverse, size, num_blocks)
    ranks = torch.arange(len(order), device=order.device)
    spots = ranks + (ranks - smaller * size).clamp_min(0) // (size - 1)  # one is left out in each smaller block
    index = order.new_zeros(num_blocks * size).index_copy_(0, spots, order)
    return _Padded(index, spots.index_select(0, inverse), size, smaller)


def _sides(blocks: Blocks) -> tuple[_Padded, _Padded]:
    rows, rows_inverse, cols, cols_inverse = blocks.orders
    return _pad(rows, rows_inverse, blocks.num_blocks), _pad(cols, cols_inverse, blocks.num_blocks)


def _anchors(anchor: Tensor, rows: _Padded, cols: _Padded, dtype: torch.dtype) -> Tensor:
    """The diagonal blocks of the anchor: (K, height, width), zero where they are padded."""
    of_rows, of_cols = rows.order.view(-1, rows.size), cols.order.view(-1, cols.size)
    if anchor.device.type != "cpu":
        found = anchor[of_rows[:, :, None], of_cols[:, None]].to(dtype)
    else:
        whole = anchor.index_select(0, rows.order).view(-1, rows.size, anchor.shape[1])
        found = anchor.new_empty(len(whole), rows.size, cols.size)
        for block, (part, order) in enumerate(zip(whole, of_cols, strict=True)):
            torch.index_select(part, 1, order, out=found[block])
        found = found.to(dtype)
    found[rows.smaller :, -1].zero_()
    found[cols.smaller :, :, -1].zero_()
    return found


def _of_blocks(factor: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """The ranks of each block: (K, max r_k, width) of A (r, width), zero where a block has fewer."""
    if len(set(ranks)) == 1:
        return factor.view(len(ranks), -1, factor.shape[1])
    padded = factor.new_zeros(len(ranks), max(ranks), factor.shape[1])
    for block, owned in enumerate(slices(ranks)):
        padded[block, : ranks[block]] = factor[owned]
    return padded


def _of_ranks(parts: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """The reverse of `_of_blocks`: (r, width)."""
    if len(set(ranks)) == 1:
        return parts.flatten(0, 1)
    return torch.cat([part[:rank] for part, rank in zip(parts, ranks, strict=True)])


def _by_block(x: Tensor, side: _Padded, dtype: torch.dtype) -> Tensor:
    """x (rows, features) by block: (K, rows, size)."""
    return x.index_select(1, side.order).to(dtype).view(len(x), -1, side.size).transpose(0, 1)


def _joined(parts: Tensor, side: _Padded) -> Tensor:
    """The reverse of `_by_block`: (rows, features)."""
    return parts.transpose(0, 1).flatten(1).index_select(1, side.place)


def stacked_forward(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`x ΔWᵀ`: (rows, out_features) in the dtype of x. ΔW is formed in float32 or wider."""
    wide, (rows, cols) = factors.wide(), _sides(factors.blocks)
    A, B = _of_blocks(wide.A, wide.ranks), _of_blocks(wide.B.T, wide.ranks)
    delta = torch.bmm(B.mT, A).mul_(_anchors(anchor, rows, cols, wide.dtype))
    dtype = product_dtype(x.dtype, x.device.type)
    y = torch.bmm(_by_block(x, cols, dtype), delta.to(dtype).mT)
    return _joined(y, rows).to(x.dtype)


def stacked_backward(
    factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x ΔWᵀ` for x (empty unless `needs_x`), A and B."""
    wide, (rows, cols) = factors.wide(), _sides(factors.blocks)
    A, B = _of_blocks(wide.A, wide.ranks), _of_blocks(wide.B.T, wide.ranks)
    anchors, dtype = _anchors(anchor, rows, cols, wide.dtype), product_dtype(x.dtype, x.device.type)
    g_parts, x_parts = _by_block(g, rows, dtype), _by_block(x, cols, dtype)
    grad_x = x.new_empty(0)
    if needs_x:
        delta = torch.bmm(B.mT, A).mul_(anchors)
        grad_x = _joined(torch.bmm(g_parts, delta.to(dtype)), cols).to(x.dtype)
    grad_delta = torch.bmm(g_parts.mT, x_parts).to(wide.dtype).mul_(anchors)
    grad_A = _of_ranks(torch.bmm(B, grad_delta), wide.ranks)
    grad_B = _of_ranks(torch.bmm(A, grad_delta.mT), wide.ranks) * factors.scale(wide.dtype)[:, None]
    return grad_x, grad_A.to(factors.A.dtype), grad_B.T.to(factors.B.dtype)
