r"""Forward and backward of a Hadamard-modulated layer as plain functions, nothing of size m×n outliving a chunk.

`fused_forward` computes `x(W + ΔW)ᵀ + b` as one product: right for float32 and float64 weights. `branch_forward`
computes `x ΔWᵀ` apart from the base layer: for bfloat16 and float16 weights, where `W(1 + δ)` would round a small δ
away, for dropout, and for a base layer with a forward of its own.

The backward needs x, the factors, the labels and the (frozen, shared) weight, and per block

    G_k = s·(g[:, I_k]ᵀ x[:, J_k]) ⊙ W[I_k, J_k],   dB_k = G_k A_kᵀ,   dA_k = B_kᵀ G_k,   gx = g(W + ΔW).

Only the diagonal blocks of gᵀx are formed. In units of one m×n product over the tokens, a step costs 2 + 1/K fused and
2 + 3/K apart. x and g are (tokens, features); W is (out_features, in_features), of any strides.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy
import torch
from torch import Tensor

from smoa.maths.modulation import BlockLayout, inverse_order, sorted_order, spread_A, spread_B

CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 25}
"""Entries of W handled at a time: few enough to stay in a CPU's cache, many enough to fill a GPU."""
MASK_COST = 64
"""What masking one entry costs, in multiplications of a matrix product (measured: docs/experiment-log.md)."""


class _Scratch(threading.local):
    """Buffers that every chunk of every call reuses, on a CPU, where the system allocator would hand each one back to
    the kernel and page it in again: a fifth of a small layer's step. At most a few chunks' worth stays allocated.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """An uninitialised (rows, cols) with the dtype and device of `like`; the next `take` of that use reuses it."""
        size = rows * cols
        if like.device.type != "cpu" or size > 2 * CHUNK_ELEMENTS["cpu"]:
            return like.new_empty(rows, cols)
        key = (use, like.dtype)
        if key not in self.buffers or self.buffers[key].numel() < size:
            with torch.inference_mode(False):  # a buffer made in inference mode couldn't be written to outside
                self.buffers[key] = torch.empty(size, dtype=like.dtype)
        return self.buffers[key][:size].view(rows, cols)


_scratch = _Scratch()


def _chunks(start: int, stop: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows of a matrix with `columns` columns, each of a bounded number of entries."""
    step = max(16, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"]) // max(columns, 1))
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def _effective_chunks(
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    layout: BlockLayout,
    scaling: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows of `W + ΔW = W ⊙ (1 + s·B̃Ã)`, in natural order.

    The scattered factors give zero off the diagonal blocks by themselves, at r multiplications an entry. When r is
    large it is cheaper to stack the blocks' ranks, at max r_k an entry, and to mask.
    """
    stacked = layout.rank - max(layout.ranks) > MASK_COST
    row_major = weight.stride(0) >= weight.stride(1)  # Conv1D's is not; keep the order in which the base layer sums
    spread_a = spread_A(A, layout, sorted_order(col_labels), stacked)
    spread_b = spread_B(B * scaling, layout, sorted_order(row_labels), stacked)
    columns = weight.shape[1]
    for chunk in _chunks(0, weight.shape[0], columns, weight.device):
        rows = chunk.stop - chunk.start
        if row_major:
            update = torch.mm(spread_b[chunk], spread_a, out=_scratch.take("update", rows, columns, weight))
        else:
            update = torch.mm(spread_a.T, spread_b[chunk].T, out=_scratch.take("update", columns, rows, weight)).T
        if stacked:
            update.mul_(row_labels[chunk, None] == col_labels)
        yield chunk, torch.addcmul(weight[chunk], weight[chunk], update, out=update)


def fused_forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
) -> Tensor:
    """`x(W + ΔW)ᵀ + b`: (tokens, out_features)."""
    layout = BlockLayout.of(weight, ranks)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for chunk, effective in _effective_chunks(A, B, weight, row_labels, col_labels, layout, scaling):
        if bias is None:
            torch.mm(x, effective.T, out=y[:, chunk])
        else:
            torch.addmm(bias[chunk], x, effective.T, out=y[:, chunk])
    return y


def fused_backward(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
    needs_x: bool,
    needs_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x(W + ΔW)ᵀ` for x, A and B; those not needed are empty."""
    grad_x, grad_A, grad_B = x.new_empty(0), A.new_empty(0), B.new_empty(0)
    if needs_factors:
        _, grad_A, grad_B = branch_backward(g, x, A, B, weight, row_labels, col_labels, ranks, scaling, False)
    if needs_x:
        grad_x = torch.empty_like(x)
        layout = BlockLayout.of(weight, ranks)
        for chunk, effective in _effective_chunks(A, B, weight, row_labels, col_labels, layout, scaling):
            grad_x.addmm_(g[:, chunk], effective, beta=int(chunk.start > 0))
    return grad_x, grad_A, grad_B


def _anchor_chunks(
    weight: Tensor, row_order: Tensor, col_order: Tensor, layout: BlockLayout
) -> Iterator[tuple[slice, slice, slice, slice, Tensor]]:
    """Runs of rows of the anchors `M_k = W[I_k, J_k]`: (sorted rows, rows within the block, cols, ranks, entries)."""
    for rows, cols, ranks in layout.blocks():
        for chunk in _chunks(rows.start, rows.stop, weight.shape[1], weight.device):
            size, width = chunk.stop - chunk.start, cols.stop - cols.start
            rows_of_w = _scratch.take("rows", size, weight.shape[1], weight)
            torch.index_select(weight, 0, row_order[chunk], out=rows_of_w)
            anchor = _scratch.take("anchor", size, width, weight)
            _columns(rows_of_w, col_order[cols], out=anchor)
            yield chunk, slice(chunk.start - rows.start, chunk.stop - rows.start), cols, ranks, anchor


def branch_forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
) -> Tensor:
    """`x ΔWᵀ`: (tokens, out_features) in the dtype of x. ΔW is formed in float32 or wider."""
    layout = BlockLayout.of(weight, ranks)
    row_order, col_order = sorted_order(row_labels), sorted_order(col_labels)
    wide = _wide(A.dtype)
    A, B = A.to(wide), B.to(wide) * scaling
    sorted_x = _columns(x, col_order).to(_product_dtype(x))
    y = sorted_x.new_empty(x.shape[0], weight.shape[0])
    for chunk, local, cols, block, anchor in _anchor_chunks(weight, row_order, col_order, layout):
        delta = torch.mm(B[local, block], A[block, : cols.stop - cols.start]).mul_(anchor)
        torch.mm(sorted_x[:, cols], delta.to(y.dtype).T, out=y[:, chunk])
    return _columns(y, inverse_order(row_order)).to(x.dtype)


def branch_backward(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    ranks: Sequence[int],
    scaling: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x ΔWᵀ` for x (if asked), A and B, from the diagonal blocks of gᵀx alone."""
    layout = BlockLayout.of(weight, ranks)
    row_order, col_order = sorted_order(row_labels), sorted_order(col_labels)
    wide = _wide(A.dtype)
    wide_A, wide_B = A.to(wide), B.to(wide) * scaling
    grad_A, grad_B = torch.zeros_like(wide_A), torch.zeros_like(wide_B)
    dtype, product_dtype = x.dtype, _product_dtype(x)
    x = _columns(x, col_order).to(product_dtype)
    grad_x = torch.zeros_like(x) if needs_x else x.new_empty(0)
    for chunk, local, cols, block, anchor in _anchor_chunks(weight, row_order, col_order, layout):
        block_A, block_B = wide_A[block, : cols.stop - cols.start], wide_B[local, block]
        chunk_g = _scratch.take("g", g.shape[0], chunk.stop - chunk.start, g)
        chunk_g = _columns(g, row_order[chunk], out=chunk_g).to(product_dtype)
        if needs_x:
            delta = torch.mm(block_B, block_A).mul_(anchor)
            grad_x[:, cols].addmm_(chunk_g, delta.to(x.dtype))
        grad_delta = _scratch.take("grad_delta", chunk_g.shape[1], cols.stop - cols.start, x)
        grad_delta = torch.mm(chunk_g.T, x[:, cols], out=grad_delta).to(wide).mul_(anchor)
        grad_B[local, block] = torch.mm(grad_delta, block_A.T).mul_(scaling)
        grad_A[block, : cols.stop - cols.start].addmm_(block_B.T, grad_delta)
    grad_x = _columns(grad_x, inverse_order(col_order)) if needs_x else grad_x
    return grad_x.to(dtype), grad_A.to(A.dtype), grad_B.to(B.dtype)


def _columns(x: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """`x[:, order]`; of two-byte entries on a CPU by NumPy, in a third of the time (docs/experiment-log.md)."""
    if x.device.type != "cpu" or x.dtype.itemsize != 2:
        return torch.index_select(x, 1, order, out=out)
    out = x.new_empty(len(x), len(order)) if out is None else out
    entries, target = (tensor.detach().view(torch.int16).numpy() for tensor in (x, out))
    numpy.take(entries, order.numpy(), axis=1, out=target, mode="clip")  # the other modes buffer the output
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the block products: that of x, but float32 on a CPU that has no instructions for x's dtype."""
    if x.device.type != "cpu" or x.dtype not in _HALF_SUPPORT or _HALF_SUPPORT[x.dtype]():
        return x.dtype
    return torch.float32


_HALF_SUPPORT = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}
