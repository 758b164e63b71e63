r"""Many adapters of one weight in one product, each token with its own adapter's factors.

    (ΔW x)[I_k] = s_k Σ_j b_kj ⊙ (M_kk (a_kj ⊙ x[J_k])),   M_kk = M[I_k, J_k]

The factors of each token's own adapter multiply x before and y after. Between them stands one batched product of the
diagonal blocks of M with the tokens of *all* adapters: r_k / K of the base layer's product, however many adapters there
are. No ΔW is formed. FLoRA (arXiv:2312.05677) is the case K = 1. The backward takes two such products more: this one
again, instead of keeping what it made, and the one with M_kkᵀ. Without modulation each token takes the two skinny
products of its own factors, as in LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoa.maths.blocks import Blocks, copied, reordered
from smoa.maths.factors import BlockRun
from smoa.maths.kernels.autograd import is_transformed, only_values, without_autocast
from smoa.maths.kernels.branch import diagonal_blocks, multiply, product_dtype

FEW_PRODUCTS = 128
"""So many products of an adapter's tokens with blocks of W cost what forming ΔW does: 64 take 0.4 to 0.9 of its time,
256 1.2 to 2.4, at rank 1 0.8 to 1.2 (32 adapters, K = 8 and 32, two threads with AVX2, 2026-11-29)."""
MOST_PRODUCTS = 256
"""So many products a CPU takes at once, for its cache: 128 take 1.0 to 1.3 of the time, 512 0.9 to 1.2, all that 32
prompts of 256 tokens need 3 to 9 (as above)."""


def prefers_shared(rank: float, tokens: int, trains: bool = False) -> bool:
    """Whether an adapter's tokens are multiplied by the blocks of W, once for each rank, instead of by those of ΔW: at
    rank 1 any number of them, but for a backward, which takes all at once."""
    return rank * tokens <= FEW_PRODUCTS or (rank == 1 and not trains)


Gathered = Sequence[tuple[Tensor, Tensor]]
"""The factors of each group, for each run: A (groups, 1, rank, blocks, width), and B (groups, 1, rank, blocks, height)
with the scale, in float32 or wider."""
Places = Tensor | list[tuple[int, int, int]]
"""Where the factors of each group are among others, or those of each run of groups: (first, end, place)."""


def gathered(
    runs: Sequence[BlockRun], A: Sequence[Tensor], B: Sequence[Tensor], scale: Tensor, slots: Tensor | None = None
) -> Gathered:
    """The factors of some adapters of one weight, which have the same blocks and ranks, as `shared` takes them;
    differentiable.

    Args:
        runs: The runs of blocks of one shape.
        A: (r, ⌈n/K⌉) of each adapter.
        B: (⌈m/K⌉, r) of each adapter.
        scale: s_k for each column of B, (adapters, r), in float32 or wider.
        slots: The adapter of each group; None for all, in this order.
    """
    own = torch.stack(tuple(A)), torch.stack(tuple(B)), scale
    all_A, all_B, scale = own if slots is None else (part.index_select(0, slots) for part in own)
    found = []
    for run in runs:
        ranks, size = slice(run.first_rank, run.first_rank + run.count * run.rank), (run.count, run.rank)
        A_k = all_A[:, ranks, : run.width].reshape(len(all_A), *size, run.width)
        B_k = (all_B[:, : run.height, ranks] * scale[:, None, ranks]).view(len(all_B), run.height, *size)
        found.append((A_k.transpose(1, 2)[:, None].contiguous(), B_k.permute(0, 3, 2, 1)[:, None].contiguous()))
    return found


Diagonal = Sequence[Tensor] | Callable[[], Sequence[Tensor]]
"""The diagonal blocks of M, (blocks, height, width) for each run, for calls without gradients and transforms, or what
gives them: called again in the backward, so that nothing of M's size is kept."""


def diagonal_of(blocks: Blocks, runs: Sequence[BlockRun], anchor: Tensor) -> list[Tensor]:
    """The diagonal blocks of M for each run: views where blocks are contiguous, but in 16 bits copies, in the dtype of
    the products: slices take a CPU three times the time."""
    if torch.compiler.is_compiling() or is_transformed(anchor):
        return [run.of_matrix(anchor, blocks) for run in runs]
    entries = [diagonal_blocks(blocks, run, anchor) for run in runs]
    dtype = product_dtype(anchor.dtype, anchor.device.type)
    return [part.to(dtype).contiguous() for part in entries] if anchor.dtype.itemsize == 2 else entries


def shared(
    blocks: Blocks,
    runs: Sequence[BlockRun],
    x: Tensor,
    factors: Gathered | Callable[[], Gathered],
    diagonal: Diagonal | None,
    total: Tensor | None = None,
    places: Places | None = None,
) -> Tensor:
    """`x ΔWᵀ` with each group's own ΔW: (groups, tokens, out_features) in the dtype of x, or `total` with it added.

    Differentiable in x and the factors, not in M.

    Args:
        blocks: The coordinates of the blocks.
        runs: The runs of blocks of one shape.
        x: (groups, tokens, in_features).
        factors: Those of each group, for calls without gradients and transforms, or what gathers them: called again in
            the backward.
        diagonal: The blocks of M; None without modulation.
        total: What it is added to, in place.
        places: Of each group in `factors`; None if these are in the order of the groups.
    """

    def given() -> tuple[Gathered, Sequence[Tensor] | None]:
        return factors() if callable(factors) else factors, diagonal() if callable(diagonal) else diagonal

    def products(x: Tensor) -> Tensor:
        return _products(blocks, runs, x, *given(), reordered)

    if only_values(x):
        all_factors, entries = given()
        total = x.new_zeros(*x.shape[:2], blocks.out_features) if total is None else total
        for groups, tokens in _pieces(x, max(run.rank for run in runs)):
            times: Callable[[Tensor, Tensor], Tensor] = torch.mul
            if isinstance(places, list):
                chosen, times = all_factors, partial(_times_by_run, _within(groups, places))
            else:
                own = groups if places is None else places[groups]
                chosen = [(A[own], B[own]) for A, B in all_factors]
            _products(blocks, runs, x[groups, tokens], chosen, entries, copied, times, total[groups, tokens])
        return total
    recomputes = callable(factors) and diagonal is not None and torch.is_grad_enabled() and not is_transformed(x)
    y = checkpoint(products, x, use_reentrant=False, preserve_rng_state=False) if recomputes else products(x)
    return y if total is None else total.add_(y)


def _pieces(x: Tensor, rank: int) -> Iterator[tuple[slice, slice]]:
    """Some groups and tokens of x (groups, tokens, in_features) after the other; on a GPU all at once."""
    groups, tokens = x.shape[:2]
    size = max(1, MOST_PRODUCTS // max(1, rank)) if x.device.type == "cpu" else groups * tokens
    step = max(1, size // max(1, tokens))
    for group in range(0, groups, step):
        yield from ((slice(group, group + step), slice(token, token + size)) for token in range(0, tokens, size))


def _within(groups: slice, places: list[tuple[int, int, int]]) -> list[tuple[slice, int]]:
    """The runs among these groups, counted from the first, and their places."""
    inside = [(max(first, groups.start), min(end, groups.stop), place) for first, end, place in places]
    return [(slice(a - groups.start, b - groups.start), place) for a, b, place in inside if a < b]


def _times_by_run(runs: list[tuple[slice, int]], factors: Tensor, values: Tensor) -> Tensor:
    """`factors * values`, of each run of groups with the factors in its place."""
    shape = torch.broadcast_shapes(factors.shape[1:], values.shape[1:])
    y = values.new_empty(len(values), *shape, dtype=torch.promote_types(factors.dtype, values.dtype))
    for groups, place in runs:
        torch.mul(factors[place], values[groups], out=y[groups])
    return y


def formed(
    blocks: Blocks, runs: Sequence[BlockRun], x: Tensor, factors: Gathered, diagonal: Sequence[Tensor]
) -> Tensor:
    """`x ΔWᵀ` of one group, whose ΔW is formed: (tokens, out_features) in the dtype of x.

    Cheaper than `shared` for many tokens; not differentiable.

    Args:
        blocks: The coordinates of the blocks.
        runs: The runs of blocks of one shape.
        x: (tokens, in_features).
        factors: The group's.
        diagonal: The blocks of M, (blocks, height, width) for each run.
    """
    dtype, deltas = product_dtype(x.dtype, x.device.type), []
    with without_autocast(x.device.type):
        for run, own, entries in zip(runs, factors, diagonal, strict=True):
            A, B = (part[0, 0].transpose(0, 1) for part in own)
            deltas.append((run, torch.bmm(B.mT, A.to(B.dtype)).mul_(entries).to(dtype)))
        if blocks.is_contiguous:
            return multiply(blocks, x, deltas)
        y = multiply(replace(blocks, is_contiguous=True), copied(x, blocks.orders.cols), deltas)
        return copied(y, blocks.orders.rows_inverse)


def _products(
    blocks: Blocks,
    runs: Sequence[BlockRun],
    x: Tensor,
    factors: Gathered,
    diagonal: Sequence[Tensor] | None,
    ordered: Callable[[Tensor, Tensor], Tensor],
    times: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    total: Tensor | None = None,
) -> Tensor:
    sorted_x, outputs = x if blocks.is_contiguous else ordered(x, blocks.orders.cols), []
    if diagonal is None:
        outputs = [_unmodulated(run, sorted_x, own) for run, own in zip(runs, factors, strict=True)]
    else:
        dtype = product_dtype(x.dtype, x.device.type)
        with without_autocast(x.device.type):  # every dtype is chosen here
            for run, (A, B), entries in zip(runs, factors, diagonal, strict=True):
                z = _multiplied(times(A, _inputs(run, sorted_x)), entries.mT, dtype)
                y = times(B, z)
                outputs.append((y.squeeze(2) if y.shape[2] == 1 else y.sum(2)).flatten(2))
    if total is not None and blocks.is_contiguous:
        for run, y in zip(runs, outputs, strict=True):
            total.narrow(2, run.first_row, y.shape[2]).add_(y)
        return total
    y = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)).to(x.dtype)
    y = y if blocks.is_contiguous else ordered(y, blocks.orders.rows_inverse)
    return y if total is None else total.add_(y)


def _multiplied(values: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Each block's values times its entries (blocks, …, …): (groups, tokens, rank, blocks, …) of such values."""
    groups, tokens, rank, blocks, _ = values.shape
    product = torch.bmm(values.to(dtype).flatten(0, 2).transpose(0, 1), entries.to(dtype))
    return product.transpose(0, 1).view(groups, tokens, rank, blocks, entries.shape[2])


def _inputs(run: BlockRun, x: Tensor) -> Tensor:
    """(groups, tokens, 1, blocks, width), of x (groups, tokens, in_features) sorted by block."""
    groups, tokens, width = x.shape
    size = run.count * run.width
    own = x if width == size else x.narrow(2, run.first_col, size)
    return own.view(groups, tokens, 1, run.count, run.width)


def _unmodulated(run: BlockRun, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    inputs = _inputs(run, x).transpose(1, 3).squeeze(2)  # (groups, blocks, tokens, width)
    A, B = (part.squeeze(1).transpose(1, 2).to(x.dtype) for part in factors)
    return (inputs @ A.mT @ B).transpose(1, 2).flatten(2)
