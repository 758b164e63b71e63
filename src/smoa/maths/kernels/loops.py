r"""Computes `x ΔWᵀ` block by block, in chunks that fit a CPU's cache.

A training step takes 2 + 3/K products, the base layer's included. The backward needs x,
the factors and the anchor (frozen, shared with the base layer). It computes for each block

    G_k = s·(g[:, I_k]ᵀ x[:, J_k]) ⊙ M_k,   dB_k = G_k A_kᵀ,   dA_k = B_kᵀ G_k,   gx[:, J_k] = g[:, I_k] ΔW_k.

Only the diagonal blocks of gᵀx are formed. x and g are (tokens, features); M is (out_features, in_features).

x, g and M are gathered by block, and the results scattered back, unless the blocks are contiguous: then all are slices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from smoa.maths.blocks import Blocks, take_columns
from smoa.maths.factors import Factors

CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 25}
"""Entries of W in one chunk: few enough for a CPU's cache, many enough to fill a GPU."""


def chunks(start: int, stop: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of the rows from `start` to `stop` of a matrix with `columns` columns, bounded in entries."""
    step = max(16, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"]) // max(columns, 1))
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class Scratch(threading.local):
    """Buffers on a CPU that every chunk of every call reuses.

    The system allocator would return each buffer to the operating system and page it in again, which takes a fifth of
    a small layer's step. A few chunks' worth stays allocated in each thread.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """An uninitialized (rows, cols) tensor with dtype and device of `like`; the next `take` for `use` reuses it."""
        size = rows * cols
        if like.device.type != "cpu" or size > 2 * CHUNK_ELEMENTS["cpu"] or isinstance(like, FakeTensor):
            return like.new_empty(rows, cols)
        key = (use, like.dtype)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # buffers made in inference mode can't be written to outside
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            if not isinstance(buffer, FakeTensor):  # which holds no memory, for this call or a later one
                self.buffers[key] = buffer
        return buffer[:size].view(rows, cols)


SCRATCH = Scratch()


def loop_forward(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`x ΔWᵀ`: (tokens, out_features) in the dtype of x. ΔW is formed in float32 or wider."""
    blocks, wide = factors.blocks, factors.wide()
    sorted_x = sort_columns(blocks, x, blocks.orders.cols).to(product_dtype(x.dtype, x.device.type))
    y = sorted_x.new_empty(x.shape[0], anchor.shape[0])
    for chunk, local, cols, ranks, entries in _anchor_chunks(wide, anchor):
        delta = torch.mm(wide.B[local, ranks], wide.A[ranks, : cols.stop - cols.start]).mul_(entries)
        torch.mm(sorted_x[:, cols], delta.to(y.dtype).T, out=y[:, chunk])
    return sort_columns(blocks, y, blocks.orders.rows_inverse).to(x.dtype)


def loop_backward(
    factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x ΔWᵀ` for x (empty unless `needs_x`), A and B, from the diagonal blocks of gᵀx."""
    blocks, wide, scale = factors.blocks, factors.wide(), factors.scale(factors.dtype)
    grad_A, grad_B = torch.zeros_like(wide.A), torch.zeros_like(wide.B)
    dtype, wider = x.dtype, product_dtype(x.dtype, x.device.type)
    x = sort_columns(blocks, x, blocks.orders.cols).to(wider)
    grad_x = torch.zeros_like(x) if needs_x else x.new_empty(0)
    for chunk, local, cols, ranks, entries in _anchor_chunks(wide, anchor):
        width = cols.stop - cols.start
        block_A, block_B = wide.A[ranks, :width], wide.B[local, ranks]
        chunk_g = _chunk_columns(blocks, g, chunk).to(wider)
        if needs_x:
            delta = torch.mm(block_B, block_A).mul_(entries)
            grad_x[:, cols].addmm_(chunk_g, delta.to(x.dtype))
        grad_delta = SCRATCH.take("grad_delta", chunk_g.shape[1], width, x)
        grad_delta = torch.mm(chunk_g.T, x[:, cols], out=grad_delta).to(factors.dtype).mul_(entries)
        grad_B[local, ranks] = torch.mm(grad_delta, block_A.T).mul_(scale[ranks])
        grad_A[ranks, :width].addmm_(block_B.T, grad_delta)
    grad_x = sort_columns(blocks, grad_x, blocks.orders.cols_inverse) if needs_x else grad_x
    return grad_x.to(dtype), grad_A.to(factors.A.dtype), grad_B.to(factors.B.dtype)


def _anchor_chunks(factors: Factors, anchor: Tensor) -> Iterator[tuple[slice, slice, slice, slice, Tensor]]:
    """Chunks of rows of the anchors `M_k = M[I_k, J_k]`.

    Yields slices of the sorted rows, of the rows within the block, of the sorted columns and of the ranks, then the
    chunk's entries of M_k.
    """
    for rows, cols, ranks in factors.slots():
        for chunk in chunks(rows.start, rows.stop, anchor.shape[1], anchor.device):
            entries = _anchor_part(factors.blocks, anchor, chunk, cols)
            yield chunk, slice(chunk.start - rows.start, chunk.stop - rows.start), cols, ranks, entries


def _anchor_part(blocks: Blocks, anchor: Tensor, chunk: slice, cols: slice) -> Tensor:
    """Some rows of a diagonal block: a view if the blocks are contiguous, else a copy in a buffer."""
    if blocks.is_contiguous:
        return anchor[chunk, cols]
    size = chunk.stop - chunk.start
    buffer = SCRATCH.take("rows", size, anchor.shape[1], anchor)
    rows = torch.index_select(anchor, 0, blocks.orders.rows[chunk], out=buffer)
    return take_columns(rows, blocks.orders.cols[cols], SCRATCH.take("anchor", size, cols.stop - cols.start, anchor))


def sort_columns(blocks: Blocks, x: Tensor, order: Tensor) -> Tensor:
    """`x[:, order]`, x itself if the blocks are contiguous; not differentiable."""
    return x if blocks.is_contiguous else take_columns(x, order, out=x.new_empty(len(x), len(order)))


def _chunk_columns(blocks: Blocks, g: Tensor, chunk: slice) -> Tensor:
    if blocks.is_contiguous:
        return g[:, chunk]
    return take_columns(g, blocks.orders.rows[chunk], out=SCRATCH.take("g", len(g), chunk.stop - chunk.start, g))


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype of the block products for x of `dtype`: the same, but float32 on a CPU that has no instructions for it."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device_type != "cpu" or name is None:
        return dtype
    # a PyTorch without oneDNN, as on Apple silicon, has no such operators
    has_instructions = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    return dtype if has_instructions else torch.float32
