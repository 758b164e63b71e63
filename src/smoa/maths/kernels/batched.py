r"""Computes `x ΔWᵀ` with one product for all blocks of one shape.

The formulas are those of `loops`, for devices on which to start an operation costs more than a pass over its operands.
How many operations are started depends on neither K nor the size of the weight. A step sorts and counts nothing, and
waits for no device.

Each product takes the blocks of x, g, A, B and M as strided views (blocks, rows, columns), so that nothing is padded.
Beside buffers of x and g, a step holds at most three times the entries of the diagonal blocks, in the dtype of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoa.maths.blocks import Blocks
from smoa.maths.factors import BlockRun, Factors
from smoa.maths.kernels.loops import SCRATCH, product_dtype, sort_columns

LARGE_BLOCK = 1 << 13
"""On a CPU, larger blocks are gathered faster by copying rows, then columns (measured: docs/experiment-log.md)."""
COPIED_ROWS = 1 << 20
"""Entries of the rows that are copied at once."""


def batched_forward(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`x ΔWᵀ`: (tokens, out_features) in the dtype of x. ΔW is formed in float32 or wider."""
    blocks = factors.blocks
    sorted_x = sort_columns(blocks, x, blocks.orders.cols).to(product_dtype(x.dtype, x.device.type))
    y = sorted_x.new_empty(len(x), anchor.shape[0])
    for run, delta in batched_delta(factors.wide(), anchor, y.dtype):
        torch.bmm(run.of_inputs(sorted_x), delta.mT, out=run.of_outputs(y))
    return sort_columns(blocks, y, blocks.orders.rows_inverse).to(x.dtype)


def batched_delta(wide: Factors, anchor: Tensor, dtype: torch.dtype) -> Iterator[tuple[BlockRun, Tensor]]:
    """The diagonal blocks of ΔW, (blocks, height, width) for each run, rounded to `dtype`, from wide factors."""
    for run in wide.runs():
        yield run, _delta(wide, run, diagonal_blocks(wide.blocks, run, anchor), dtype)


def multiply(blocks: Blocks, x: Tensor, deltas: Iterable[tuple[BlockRun, Tensor]]) -> Tensor:
    """`x ΔWᵀ` (…, out_features) in the dtype of x, from the diagonal blocks of ΔW as `batched_delta` gives them."""
    flat = blocks.sort_inputs(x.reshape(-1, x.shape[-1]))
    parts = [(run.of_inputs(flat).to(delta.dtype) @ delta.mT).transpose(0, 1).flatten(1) for run, delta in deltas]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return blocks.unsort_outputs(y).to(x.dtype).view(*x.shape[:-1], y.shape[1])  # of all slices of a fused layer


def batched_backward(
    factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x ΔWᵀ` for x (empty unless `needs_x`), A and B, from the diagonal blocks of gᵀx."""
    blocks, wide, dtype = factors.blocks, factors.wide(), product_dtype(x.dtype, x.device.type)
    sorted_x = sort_columns(blocks, x, blocks.orders.cols).to(dtype)
    sorted_g = sort_columns(blocks, g, blocks.orders.rows).to(dtype)
    runs = wide.runs()
    make = torch.empty_like if len(runs) == 1 else torch.zeros_like  # smaller blocks leave a row or column unused
    grad_A, grad_B = make(wide.A), make(wide.B)
    grad_x = torch.empty_like(sorted_x) if needs_x else x.new_empty(0)
    for run in runs:
        run_g = run.of_outputs(sorted_g)
        grad_delta = torch.bmm(run_g.mT, run.of_inputs(sorted_x)).to(wide.dtype)
        entries = diagonal_blocks(blocks, run, anchor)
        grad_delta.mul_(entries)
        torch.bmm(run.of_B(wide.B).mT, grad_delta, out=run.of_A(grad_A))
        torch.bmm(grad_delta, run.of_A(wide.A).mT, out=run.of_B(grad_B))
        del grad_delta  # before ΔW takes as much
        if needs_x:
            torch.bmm(run_g, _delta(wide, run, entries, dtype), out=run.of_inputs(grad_x))
    if needs_x:
        grad_x = sort_columns(blocks, grad_x, blocks.orders.cols_inverse).to(x.dtype)
    grad_B = grad_B.mul_(factors.scale(factors.dtype))
    return grad_x, grad_A.to(factors.A.dtype), grad_B.to(factors.B.dtype)


def _delta(wide: Factors, run: BlockRun, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """The blocks of ΔW of a run, from those of M, which it may overwrite."""
    product = torch.bmm(run.of_B(wide.B), run.of_A(wide.A))
    if entries.dtype == dtype and not wide.blocks.is_contiguous:
        return entries.mul_(product)  # multiplied in float32, then rounded into the copy
    return product.mul_(entries).to(dtype)


def diagonal_blocks(blocks: Blocks, run: BlockRun, anchor: Tensor) -> Tensor:
    """The blocks `M[I_k, J_k]` of a run, (blocks, height, width): a view of M if they are contiguous, else a copy."""
    if blocks.is_contiguous or anchor.device.type != "cpu" or run.height * run.width <= LARGE_BLOCK:
        return run.of_matrix(anchor, blocks)
    rows, cols = run.indices(blocks.orders)
    entries, columns = anchor.new_empty(run.count, run.height, run.width), anchor.shape[1]
    step = max(1, COPIED_ROWS // (run.height * columns))
    for first in range(0, run.count, step):
        part = slice(first, min(first + step, run.count))
        height = (part.stop - first) * run.height
        buffer = torch.index_select(anchor, 0, rows[part].flatten(), out=SCRATCH.take("rows", height, columns, anchor))
        torch.gather(buffer.view(-1, run.height, columns), 2, cols[part].expand(-1, run.height, -1), out=entries[part])
    return entries


def plain_branch(factors: Factors, x: Tensor, anchor: Tensor | None) -> Tensor:
    """`x ΔWᵀ` by PyTorch's own operations: (…, out_features), without modulation if `anchor` is None.

    With an anchor, autograd keeps the K modulated blocks, 1/K of W, and also differentiates the anchor.
    """
    blocks, flat = factors.blocks, x.reshape(-1, x.shape[-1])
    sorted_x, outputs = blocks.sort_inputs(flat), []
    wide = factors.wide(factors.B.dtype if anchor is None else None)
    for run in factors.runs():
        inputs, A, B = run.of_inputs(sorted_x), run.of_A(wide.A), run.of_B(wide.B)
        delta = None if anchor is None else (B @ A * run.of_matrix(anchor, blocks)).to(x.dtype)
        y = inputs @ A.mT @ B.mT if delta is None else inputs @ delta.mT
        outputs.append(y.transpose(0, 1).reshape(flat.shape[0], run.count * run.height))
    return blocks.unsort_outputs(torch.cat(outputs, dim=-1)).view(*x.shape[:-1], blocks.out_features)


def recomputed_branch(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`plain_branch` for a compiled model: the backward computes the blocks of ΔW again instead of keeping them.

    A compiler fuses gathers, products with M, scales and casts. Without the checkpoint it would keep the blocks
    (measured: docs/experiment-log.md).
    """
    if not torch.is_grad_enabled():
        return plain_branch(factors, x, anchor)
    y: Tensor = checkpoint(plain_branch, factors, x, anchor, use_reentrant=False, preserve_rng_state=False)
    return y
