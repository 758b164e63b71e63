r"""Rows of ΔW, computed without forming ΔW: what an adapted embedding adds to its output.

A row v of block k, `v ∈ I_k`, is `ΔW[v, J_k] = s_k·(b_v A_k) ⊙ M[v, J_k]`, zero elsewhere, where b_v is its row of B_k.
A lookup touches the looked-up rows of B and M only. It is made of PyTorch's own operations, and autograd keeps nothing
larger than the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smoa.maths.scale import rank_scale
from smoa.maths.update import Update


def looked_up(update: Update, tokens: Tensor, weight: Tensor, padding: int | None, by_freq: bool) -> Tensor:
    """`ΔW[tokens]`: (tokens, in_features), float32 or wider; differentiable in A and B.

    Args:
        update: The update of the table.
        tokens: int (tokens,), the rows to look up.
        weight: Pristine W (out_features, in_features), a row for each token.
        padding: The row that gets no gradient, as `padding_idx` of an embedding.
        by_freq: Divide the gradient of a row by the number of its occurrences, as `scale_grad_by_freq` does.
    """
    factors = update.factors
    with torch.autocast(weight.device.type, enabled=False):  # it would round the factors
        rows = (_rows_of_B(update, tokens) * factors.scale(factors.dtype)) @ factors.spread_A().to(factors.dtype)
        anchor = update.anchor(weight)
        rows = rows if anchor is None else rows * F.embedding(tokens, anchor)
        if padding is not None:
            rows = torch.where((tokens == padding)[:, None], rows.detach(), rows)
        if by_freq and rows.requires_grad:
            _, inverse, counts = tokens.unique(return_inverse=True, return_counts=True)
            rows.register_hook(lambda gradient: gradient / counts[inverse][:, None])
        return rows


def _rows_of_B(update: Update, tokens: Tensor) -> Tensor:
    """The rows of B̃: (tokens, r), zero at the ranks of other blocks, without the scale."""
    factors, blocks = update.factors, update.factors.blocks
    block = blocks.row_labels[tokens].long()
    size, larger = divmod(blocks.out_features, blocks.num_blocks)
    first = block * size + block.clamp(max=larger)  # of the block, in the sorted order
    place = blocks.orders.rows_inverse[tokens] - first
    owner = rank_scale(torch.arange(blocks.num_blocks, device=tokens.device), factors.ranks)  # of each rank
    return F.embedding(place, factors.B).to(factors.dtype) * (block[:, None] == owner)
