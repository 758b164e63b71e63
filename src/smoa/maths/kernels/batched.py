r"""Computes `x ΔWᵀ` with one product for all blocks of one shape.

The formulas are those of `loops`, for devices on which to start an operation costs more than a pass over its operands.
How many operations are started depends on neither K nor the size of the weight. A step sorts and counts nothing, and
waits for no device.

Each product takes the blocks of x, g, A, B and M as strided views (blocks, rows, columns), so that nothing is padded.
Beside buffers of x and g, a step holds at most three times the entries of the diagonal blocks, in the dtype of W.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks
from smoa.maths.factors import Factors
from smoa.maths.kernels.block_runs import BlockRun, runs_of
from smoa.maths.kernels.loops import anchor_part, product_dtype, sort_columns

LARGE_BLOCK = 1 << 13
"""Entries from which blocks are gathered rows first on a CPU (measured: docs/experiment-log.md)."""


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
    for run in runs_of(wide):
        product = torch.bmm(run.of_B(wide.B), run.of_A(wide.A))
        if _gathers_rows_first(wide.blocks, run, anchor):
            yield run, _modulated(product, wide.blocks, run, anchor).to(dtype)
            continue
        entries = block_entries(wide.blocks, run, anchor)
        if entries.dtype == dtype and not wide.blocks.is_contiguous:
            yield run, entries.mul_(product)  # multiplied in float32, then rounded into the copy
        else:
            yield run, product.mul_(entries).to(dtype)


def batched_backward(
    factors: Factors, g: Tensor, x: Tensor, anchor: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x ΔWᵀ` for x (empty unless `needs_x`), A and B, from the diagonal blocks of gᵀx."""
    blocks, wide, dtype = factors.blocks, factors.wide(), product_dtype(x.dtype, x.device.type)
    sorted_x = sort_columns(blocks, x, blocks.orders.cols).to(dtype)
    sorted_g = sort_columns(blocks, g, blocks.orders.rows).to(dtype)
    grad_A, grad_B = _gradients_of_factors(wide, sorted_g, sorted_x, anchor)
    grad_B = grad_B.mul_(factors.scale(factors.dtype))
    grad_x = torch.empty_like(sorted_x) if needs_x else x.new_empty(0)
    if needs_x:
        for run, delta in batched_delta(wide, anchor, dtype):
            torch.bmm(run.of_outputs(sorted_g), delta, out=run.of_inputs(grad_x))
        grad_x = sort_columns(blocks, grad_x, blocks.orders.cols_inverse).to(x.dtype)
    return grad_x, grad_A.to(factors.A.dtype), grad_B.to(factors.B.dtype)


def _gradients_of_factors(wide: Factors, sorted_g: Tensor, sorted_x: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for the wide A and B."""
    runs = runs_of(wide)
    make = torch.empty_like if len(runs) == 1 else torch.zeros_like  # smaller blocks leave a row or column unused
    grad_A, grad_B = make(wide.A), make(wide.B)
    for run in runs:
        grad_delta = torch.bmm(run.of_outputs(sorted_g).mT, run.of_inputs(sorted_x)).to(wide.dtype)
        grad_delta = _modulated(grad_delta, wide.blocks, run, anchor)
        torch.bmm(run.of_B(wide.B).mT, grad_delta, out=run.of_A(grad_A))
        torch.bmm(grad_delta, run.of_A(wide.A).mT, out=run.of_B(grad_B))
    return grad_A, grad_B


def block_entries(blocks: Blocks, run: BlockRun, anchor: Tensor) -> Tensor:
    """The blocks `M[I_k, J_k]` of a run, (blocks, height, width): a view of M if they are contiguous, else a copy."""
    if blocks.is_contiguous:
        return run.of_slices(anchor)
    rows, cols = run.indices(blocks.orders)
    return anchor[rows, cols]


def _gathers_rows_first(blocks: Blocks, run: BlockRun, anchor: Tensor) -> bool:
    """Whether it is faster to copy whole rows of M, then their columns, than to pick entries by two indices at once."""
    return anchor.device.type == "cpu" and not blocks.is_contiguous and run.height * run.width > LARGE_BLOCK


def _modulated(product: Tensor, blocks: Blocks, run: BlockRun, anchor: Tensor) -> Tensor:
    """`product ⊙ M_k`, in place."""
    if not _gathers_rows_first(blocks, run, anchor):
        return product.mul_(block_entries(blocks, run, anchor))
    for k, block in enumerate(product):
        first_row, first_col = run.first_row + k * run.height, run.first_col + k * run.width
        rows, cols = slice(first_row, first_row + run.height), slice(first_col, first_col + run.width)
        block.mul_(anchor_part(blocks, anchor, rows, cols))
    return product
