r"""Computes `x ΔWᵀ`, a piece of the diagonal blocks at a time, and applies blocks of ΔW that are formed already.

A training step takes 2 + 3/K products, the base layer's included. The backward needs x, the factors and the anchor M
(frozen, shared with the base layer). It computes for each block

    G_k = s·(g[:, I_k]ᵀ x[:, J_k]) ⊙ M_k,   dB_k = G_k A_kᵀ,   dA_k = B_kᵀ G_k,   gx[:, J_k] = g[:, I_k] ΔW_k.

Only the diagonal blocks of gᵀx are formed. x and g are (tokens, features); M is (out_features, in_features).

A piece is a run of blocks of one shape, as strided views (blocks, rows, columns), so that nothing is padded: a step
starts the same operations for any K and any size of W. Only a CPU cuts the runs, to fit its cache. x, g and M are
gathered by block, and the results scattered back, unless the blocks are contiguous: then all are slices.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from smoa.kernels.autograd import Gradients, without_autocast
from smoa.kernels.factors import BlockRun, Factors, runs_of
from smoa.kernels.scale import as_dtype
from smoa.partition import Blocks, take_columns

PIECE = 1 << 21
"""Entries of the rows of W that a piece touches on a CPU (docs/decisions.md)."""
FEW_ROWS = 4
"""Up to so many are sorted sooner by PyTorch than by NumPy."""
LARGE_BLOCK = 1 << 13
"""On a CPU, larger blocks are gathered faster by copying rows, then columns (docs/decisions.md)."""

FEW_ENTRIES = 1 << 14
"""Entries of buffers that the allocator keeps by itself."""

Deltas = list[tuple[BlockRun, Tensor]]
"""The diagonal blocks of one ΔW: (blocks, height, width) for each run of blocks of one shape."""


class Scratch(threading.local):
    """Buffers on a CPU that every piece of every call reuses.

    The system allocator would return each buffer to the operating system and page it in again, which takes a fifth of
    a small layer's step. A few pieces' worth stays allocated in each thread.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], like: Tensor, most: int = 2 * PIECE) -> Tensor:
        """An uninitialized tensor with dtype and device of `like`; the next `take` for `use` reuses it, unless it has
        more entries than `most`."""
        size = math.prod(shape)
        if not FEW_ENTRIES < size <= most or like.device.type != "cpu":
            return like.new_empty(shape)
        key = (use, like.dtype)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # buffers made in inference mode can't be written to outside
                buffer = torch.empty(size, dtype=like.dtype, device=like.device)
            self.buffers[key] = buffer
        return buffer[:size].view(shape)


SCRATCH = Scratch()


def rows_of_piece(columns: int) -> int:
    """Rows of a piece of a weight with so many columns, on a CPU."""
    return max(16, PIECE // max(columns, 1))


def pieces(factors: Factors, device: torch.device) -> Sequence[BlockRun]:
    """The runs of blocks of one shape, cut for a CPU."""
    return factors.runs() if device.type != "cpu" else _pieces_of(*factors.blocks.shape, factors.ranks)


@lru_cache(maxsize=4096)
def _pieces_of(out_features: int, in_features: int, ranks: tuple[int, ...]) -> tuple[BlockRun, ...]:
    rows = rows_of_piece(in_features)
    return tuple(piece for run in runs_of(out_features, in_features, ranks) for piece in run.cut(rows))


def plain_branch(factors: Factors, x: Tensor, anchor: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """`x ΔWᵀ` by PyTorch's own operations: (…, out_features), without modulation if `anchor` is None.

    With an anchor, autograd keeps the K modulated blocks, 1/K of W, and also differentiates the anchor.
    """
    blocks, flat = factors.blocks, x.reshape(-1, x.shape[-1])
    sorted_x, outputs = blocks.sort_inputs(flat), []
    scaled_A, scaled_B = factors.scaled(factors.B.dtype if anchor is None else factors.dtype)
    for run in factors.runs():
        inputs, A, B = run.of_inputs(sorted_x), run.of_A(scaled_A), run.of_B(scaled_B)
        delta = None if anchor is None else (B @ A * run.of_matrix(anchor, blocks)).to(x.dtype)
        y = inputs @ A.mT @ B.mT if delta is None else inputs @ delta.mT
        outputs.append(y.transpose(0, 1).reshape(flat.shape[0], run.count * run.height))
    return blocks.unsort_outputs(torch.cat(outputs, dim=-1)).view(*x.shape[:-1], blocks.out_features)


class Branch:
    """`x ΔWᵀ` for x (tokens, in_features) and the anchor M; there is no bias. ΔW is formed in float32 or wider."""

    def forward(self, factors: Factors, x: Tensor, anchor: Tensor, bias: Tensor | None = None) -> Tensor:
        """y: (tokens, out_features) in the dtype of x, not differentiable."""
        blocks, wide = factors.blocks, factors.scaled(factors.dtype)
        sorted_x = as_dtype(sort_columns(blocks, x, blocks.orders.cols), product_dtype(x.dtype, x.device.type))
        y = sorted_x.new_empty(x.shape[0], anchor.shape[0])
        for piece in pieces(factors, x.device):
            delta = _delta(wide, piece, diagonal_blocks(blocks, piece, anchor, reuses=True), y.dtype, blocks)
            torch.bmm(piece.of_inputs(sorted_x), delta.mT, out=piece.of_outputs(y))
        return as_dtype(sort_columns(blocks, y, blocks.orders.rows_inverse), x.dtype)

    plain = staticmethod(plain_branch)

    def backward(self, factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool) -> Gradients:
        """Gradients for x (empty unless `needs_x`), A and B, from the diagonal blocks of gᵀx."""
        blocks, dtype = factors.blocks, product_dtype(x.dtype, x.device.type)
        scale = factors.scale(factors.dtype)
        A, B = wide = as_dtype(factors.A, scale.dtype), factors.B * scale
        sorted_x = as_dtype(sort_columns(blocks, x, blocks.orders.cols), dtype)
        empty = torch.empty_like if factors.runs()[0].is_all else torch.zeros_like  # what pads a block stays zero
        grad_A, grad_B = empty(A), empty(B)
        grad_x = torch.empty_like(sorted_x) if needs_x else x.new_empty(0)
        for piece in pieces(factors, x.device):
            own_g, own_x = as_dtype(_outputs(blocks, piece, g), dtype), piece.of_inputs(sorted_x)
            if dtype.itemsize == 2:  # in 16 bits strided operands take a CPU three to eight times as long
                own_g = own_g.contiguous()
            beta = int(piece.skipped > 0)  # the first rows of a block overwrite, the others are added
            entries = diagonal_blocks(blocks, piece, anchor, reuses=True)
            if factors.trains:
                grad_delta = SCRATCH.take("grad_delta", piece.shape, own_x)
                grad_delta = as_dtype(torch.bmm(own_g.mT, own_x, out=grad_delta), B.dtype).mul_(entries)
                piece.of_A(grad_A).baddbmm_(piece.of_B(B).mT, grad_delta, beta=beta)
                torch.bmm(grad_delta, piece.of_A(A).mT, out=piece.of_B(grad_B))
                del grad_delta  # before ΔW takes as much
            if needs_x:
                piece.of_inputs(grad_x).baddbmm_(own_g, _delta(wide, piece, entries, dtype, blocks), beta=beta)
        if needs_x:
            grad_x = as_dtype(sort_columns(blocks, grad_x, blocks.orders.cols_inverse), x.dtype)
        return grad_x, as_dtype(grad_A, factors.A.dtype), as_dtype(grad_B.mul_(scale), factors.B.dtype)


def _outputs(blocks: Blocks, piece: BlockRun, g: Tensor) -> Tensor:
    """The columns of g that a piece needs: (blocks, tokens, height)."""
    if blocks.is_contiguous:
        return piece.of_outputs(g)
    rows = blocks.orders.rows.narrow(0, piece.first_row, piece.count * piece.height)
    tokens = g.shape[0]
    if tokens <= FEW_ROWS:
        own = g.index_select(1, rows)
    else:
        own = take_columns(g, rows, SCRATCH.take("g", (tokens, rows.shape[0]), g))
    return own.view(tokens, piece.count, piece.height).transpose(0, 1)


def _delta(scaled: tuple[Tensor, Tensor], run: BlockRun, entries: Tensor, dtype: torch.dtype, blocks: Blocks) -> Tensor:
    """The blocks of ΔW of a run, from the factors with their scale and the blocks of M, which it may overwrite."""
    A, B = scaled
    product = torch.bmm(run.of_B(B), run.of_A(A))
    if entries.dtype == dtype and not blocks.is_contiguous:
        return entries.mul_(product)  # multiplied in float32, then rounded into the copy
    return as_dtype(product.mul_(entries), dtype)


def block_deltas(factors: Factors, anchor: Tensor, dtype: torch.dtype) -> Deltas:
    """The diagonal blocks of ΔW, rounded to the dtype of products for x of `dtype`."""
    with without_autocast(anchor.device.type):  # it would round the factors
        wide, blocks = factors.scaled(factors.dtype), factors.blocks
        dtype = product_dtype(dtype, anchor.device.type)
        runs = factors.runs()
        return [(run, _delta(wide, run, diagonal_blocks(blocks, run, anchor), dtype, blocks)) for run in runs]


def multiply(x: Tensor, blocks: Blocks, deltas: Deltas) -> Tensor:
    """`x ΔWᵀ` (…, out_features) in the dtype of x, from the diagonal blocks of ΔW; not differentiable."""
    flat = sort_columns(blocks, x.reshape(-1, x.shape[-1]), blocks.orders.cols)
    own = (torch.bmm(as_dtype(run.of_inputs(flat), delta.dtype), delta.mT) for run, delta in deltas)
    parts = [y.transpose(0, 1).flatten(1) for y in own]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    y = as_dtype(sort_columns(blocks, y, blocks.orders.rows_inverse), x.dtype)
    return y.view(*x.shape[:-1], y.shape[1])


def diagonal_blocks(blocks: Blocks, run: BlockRun, anchor: Tensor, reuses: bool = False) -> Tensor:
    """The blocks `M[I_k, J_k]` of a run, (blocks, height, width): a view of M if they are contiguous, else a copy,
    which the next call overwrites if this one `reuses` memory."""
    if blocks.is_contiguous or anchor.device.type != "cpu" or run.height * run.width <= LARGE_BLOCK:
        return run.of_matrix(anchor, blocks)
    out = SCRATCH.take("anchor", run.shape, anchor) if reuses else anchor.new_empty(run.shape)
    places, first = out.view(-1, run.width), run.first_row
    for piece in run.cut(rows_of_piece(anchor.shape[1])):
        rows, cols = piece.indices(blocks.orders)
        chosen = SCRATCH.take("rows", (rows.numel(), anchor.shape[1]), anchor)
        torch.index_select(anchor, 0, rows.flatten(), out=chosen)
        target = places[piece.first_row - first : piece.first_row - first + len(chosen)]
        if piece.count == 1:
            take_columns(chosen, cols.flatten(), target)
        else:
            shape = piece.count, piece.height, -1
            torch.gather(chosen.view(shape), 2, cols.expand(shape), out=target.view(shape))
    return out


def sort_columns(blocks: Blocks, x: Tensor, order: Tensor) -> Tensor:
    """`x[..., order]`, x itself if the blocks are contiguous; sooner than `reordered` and not differentiable."""
    if blocks.is_contiguous:
        return x
    if x.dim() > 2:
        return sort_columns(blocks, x.flatten(0, -2), order).view(*x.shape[:-1], order.shape[0])
    if x.shape[0] <= FEW_ROWS:
        return x.index_select(1, order)
    return take_columns(x, order, x.new_empty(x.shape[0], order.shape[0]))


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype of the block products for x of `dtype`: the same, but float32 on a CPU that has no instructions for it."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device_type != "cpu" or name is None:
        return dtype
    # a PyTorch without oneDNN, as on Apple silicon, has no such operators
    has_instructions = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    return dtype if has_instructions else torch.float32
