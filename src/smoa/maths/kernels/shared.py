r"""Many adapters of one weight in one product, each token with its own adapter's factors.

    (ΔW x)[I_k] = s_k Σ_j b_kj ⊙ (M_kk (a_kj ⊙ x[J_k])),   M_kk = M[I_k, J_k]

The factors of each token's own adapter multiply x before and y after. Between them stands one batched product of the
diagonal blocks of M with the tokens of *all* adapters: r_k / K of the base layer's product, however many adapters there
are. No ΔW is formed. FLoRA (arXiv:2312.05677) is the case K = 1. The backward takes two such products more: this one
again, instead of keeping what it made, and the one with M_kkᵀ. Without modulation each token takes the two skinny
products of its own factors, as in LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product, repeat

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoa.maths.blocks import Blocks
from smoa.maths.factors import BlockRun
from smoa.maths.kernels.autograd import is_transformed, only_values, without_autocast
from smoa.maths.kernels.branch import diagonal_blocks, multiply, product_dtype, sort_columns

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
LOW = 32
"""Blocks of fewer rows, and fewer than columns, multiply x transposed: 6 × 18 takes a CPU 0.5 of the time."""
Places = Tensor | list[tuple[int, int, int]]
"""Where the factors of each group are among others, or those of each run of groups: (first, end, place)."""
Within = list[tuple[slice, int]] | None
"""Runs of groups and the places of their factors; None where each group has its own."""


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
) -> Tensor:
    """`x ΔWᵀ` with each group's own ΔW: (groups, tokens, out_features) in the dtype of x.

    Differentiable in x and the factors, not in M.

    Args:
        blocks: The coordinates of the blocks.
        runs: The runs of blocks of one shape.
        x: (groups, tokens, in_features).
        factors: Those of each group, for calls without gradients and transforms, or what gathers them: called again in
            the backward.
        diagonal: The blocks of M; None without modulation.
    """

    def given() -> tuple[Gathered, Sequence[Tensor] | None]:
        return factors() if callable(factors) else factors, diagonal() if callable(diagonal) else diagonal

    def products(x: Tensor) -> Tensor:
        return _products(blocks, runs, x, *given())

    if only_values(x):
        total = x.new_zeros(*x.shape[:2], blocks.out_features)
        add_shared(total, blocks, runs, x, *given())
        return total
    recomputes = callable(factors) and diagonal is not None and torch.is_grad_enabled() and not is_transformed(x)
    return checkpoint(products, x, use_reentrant=False, preserve_rng_state=False) if recomputes else products(x)


def add_shared(
    total: Tensor,
    blocks: Blocks,
    runs: Sequence[BlockRun],
    x: Tensor,
    factors: Gathered,
    diagonal: Sequence[Tensor] | None,
    places: Places | None = None,
) -> None:
    """Add what `shared` gives to `total`, (groups, tokens, out_features), without gradients.

    `places` are those of each group in `factors`; None if these are in the order of the groups.
    """
    pieces = _pieces(x, max(run.rank for run in runs))
    if places is None and len(pieces) == 1:
        _add_piece(total, blocks, runs, x, factors, diagonal)
        return
    for groups, tokens in pieces:
        if isinstance(places, list):
            chosen, within = factors, _within(groups, places)
        else:
            own = groups if places is None else places[groups]
            chosen, within = [(A[own], B[own]) for A, B in factors], None
        _add_piece(total[groups, tokens], blocks, runs, x[groups, tokens], chosen, diagonal, within)


def _pieces(x: Tensor, rank: int) -> list[tuple[slice, slice]]:
    """Some groups and tokens of x (groups, tokens, in_features) after the other; on a GPU all at once."""
    groups, tokens = x.shape[:2]
    size = max(1, MOST_PRODUCTS // max(1, rank)) if x.device.type == "cpu" else max(1, groups * tokens)
    step = max(1, size // max(1, tokens))
    places = product(range(0, groups, step), range(0, tokens, size))
    return [(slice(group, group + step), slice(token, token + size)) for group, token in places]


def _within(groups: slice, places: list[tuple[int, int, int]]) -> list[tuple[slice, int]]:
    """The runs among these groups, counted from the first, and their places."""
    inside = [(max(first, groups.start), min(end, groups.stop), place) for first, end, place in places]
    return [(slice(a - groups.start, b - groups.start), place) for a, b, place in inside if a < b]


def _times(factors: Tensor, values: Tensor, within: Within) -> Tensor:
    """`factors * values`, of each run of groups with the factors in its place."""
    if within is None:
        return factors * values
    shape = torch.broadcast_shapes(factors.shape[1:], values.shape[1:])
    y = values.new_empty(len(values), *shape, dtype=torch.promote_types(factors.dtype, values.dtype))
    for groups, place in within:
        torch.mul(factors[place], values[groups], out=y[groups])
    return y


def _add_times(total: Tensor, factors: Tensor, values: Tensor, within: Within) -> None:
    """Add `factors * values`, summed over the ranks, to total (groups, tokens, 1, blocks, height)."""
    if within is not None:
        for groups, place in within:
            _add_times(total[groups], factors[place], values[groups], None)
    elif values.shape[-3] == 1:
        total.addcmul_(factors, values)
    else:
        total.add_((factors * values).sum(-3, keepdim=True))


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
        return multiply(blocks, x, deltas)


def _products(
    blocks: Blocks, runs: Sequence[BlockRun], x: Tensor, factors: Gathered, diagonal: Sequence[Tensor] | None
) -> Tensor:
    """`x ΔWᵀ`, differentiable."""
    sorted_x, dtype, outputs = blocks.sort_inputs(x), product_dtype(x.dtype, x.device.type), []
    for run, (A, B), entries in zip(runs, factors, diagonal or repeat(None, len(runs)), strict=True):
        if entries is None:
            outputs.append(_unmodulated(run, sorted_x, (A, B)))
            continue
        with without_autocast(x.device.type):  # every dtype is chosen here
            outputs.append((B * _multiplied(A * _inputs(run, sorted_x), entries, dtype)).sum(2).flatten(2))
    return blocks.unsort_outputs(torch.cat(outputs, dim=-1).to(x.dtype))


def _add_piece(
    total: Tensor,
    blocks: Blocks,
    runs: Sequence[BlockRun],
    x: Tensor,
    factors: Gathered,
    diagonal: Sequence[Tensor] | None,
    within: Within = None,
) -> None:
    """Add what `_products` gives to `total`, in few operations."""
    sorted_x = sort_columns(blocks, x, blocks.orders.cols)
    y = total if blocks.is_contiguous else x.new_zeros(*x.shape[:2], len(blocks.orders.rows))
    dtype = product_dtype(x.dtype, x.device.type)
    for run, (A, B), entries in zip(runs, factors, diagonal or repeat(None, len(runs)), strict=True):
        own = y.narrow(2, run.first_row, run.count * run.height)
        if entries is None:
            own.add_(_unmodulated(run, sorted_x, (A, B)))
            continue
        with without_autocast(x.device.type):
            z = _multiplied(_times(A, _inputs(run, sorted_x), within), entries, dtype)
        _add_times(own.view(*own.shape[:2], 1, run.count, run.height), B, z, within)
    if not blocks.is_contiguous:
        total.add_(sort_columns(blocks, y, blocks.orders.rows_inverse))


def _multiplied(values: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Each block's values times its entries (blocks, height, width): (groups, tokens, rank, blocks, height)."""
    groups, tokens, rank, blocks, _ = values.shape
    if not values.dtype == entries.dtype == dtype:
        values, entries = values.to(dtype), entries.to(dtype)
    values = values.view(-1, blocks, values.shape[-1]).transpose(0, 1)
    if values.device.type == "cpu" and entries.shape[1] < min(LOW, entries.shape[2]):
        made = torch.bmm(entries, values.mT).flatten(0, 1).T.contiguous()
    else:
        made = torch.bmm(values, entries.mT).transpose(0, 1)
    return made.view(groups, tokens, rank, blocks, entries.shape[1])


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
