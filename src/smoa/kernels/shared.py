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
from itertools import product, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from smoa.kernels.autograd import checkpointed, is_transformed, without_autocast
from smoa.kernels.blocks import diagonal_blocks, multiply, product_dtype, sort_columns
from smoa.kernels.factors import BlockRun, Factors
from smoa.partition import Blocks

FEW_PRODUCTS = 128
"""So many products of an adapter's tokens with blocks of W cost what forming ΔW does: 64 take 0.4 to 0.9 of its time,
256 1.2 to 2.4, at rank 1 0.8 to 1.2 (32 adapters, K = 8 and 32, two threads with AVX2, 2026-11-29)."""
MOST_PRODUCTS = 256
"""So many products a CPU takes at once, for its cache: 128 take 1.0 to 1.3 of the time, 512 0.9 to 1.2, all that 32
prompts of 256 tokens need 3 to 9 (as above)."""
MOST_ON_GPU = 2048
"""So many a GPU, for its memory: with the widest layer of an 8B model, 4096 + 28672 coordinates, they take 270 MB."""


def prefers_shared(rank: int, tokens: int, trains: bool = False) -> bool:
    """Whether an adapter's tokens are multiplied by the blocks of W, once for each rank, instead of by those of ΔW: at
    rank 1 any number of them, but for a backward, which takes all at once."""
    return rank * tokens <= FEW_PRODUCTS or (rank == 1 and not trains)


Gathered = Sequence[tuple[Tensor, Tensor]]
"""The factors of each group, for each run: A (groups, 1, rank, blocks, width), and B (groups, 1, rank, blocks, height)
with the scale, in float32 or wider."""
LOW = 32
"""Blocks of fewer rows, and fewer than columns, multiply x transposed: 6 × 18 takes a CPU 0.5 of the time."""


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


def of_slots(factors: Gathered, slots: slice | Tensor) -> Gathered:
    """The factors of these slots: views, or copies in any order."""
    if isinstance(slots, slice):
        return [(A[slots], B[slots]) for A, B in factors]
    return [(A.index_select(0, slots), B.index_select(0, slots)) for A, B in factors]


def shared_by_one(factors: Factors, x: Tensor, anchor: Tensor) -> Tensor:
    """`x ΔWᵀ` of one adapter for few tokens, by the same products; not differentiable.

    Args:
        factors: The adapter's.
        x: (tokens, in_features).
        anchor: M (out_features, in_features).
    """
    blocks, dtype, parts = factors.blocks, product_dtype(x.dtype, x.device.type), []
    A, B = factors.scaled(factors.dtype)
    own = sort_columns(blocks, x, blocks.orders.cols)
    for run in factors.runs():
        entries = diagonal_blocks(blocks, run, anchor).to(dtype)
        values = run.of_A(A).unsqueeze(1) * run.of_inputs(own).unsqueeze(2)  # (blocks, tokens, rank, width)
        z = torch.bmm(values.flatten(1, 2).to(dtype), entries.mT).view(*values.shape[:3], run.height)
        y = (z * run.of_B(B).mT.unsqueeze(1)).sum(2)
        parts.append(y.transpose(0, 1).flatten(1))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return sort_columns(blocks, y, blocks.orders.rows_inverse).to(x.dtype)


class Diagonal(NamedTuple):
    """The diagonal blocks of M, which adapters of one weight share.

    Args:
        blocks: The coordinates of the blocks.
        runs: The runs of blocks of one shape.
        entries: The blocks of M, (blocks, height, width) for each run; None without modulation.
    """

    blocks: Blocks
    runs: Sequence[BlockRun]
    entries: Sequence[Tensor] | None


def entries_of(blocks: Blocks, runs: Sequence[BlockRun], anchor: Tensor) -> list[Tensor]:
    """The entries of a `Diagonal`: views where blocks are contiguous, but in 16 bits copies, in the dtype of
    the products: slices take a CPU three times the time."""
    if torch.compiler.is_compiling() or anchor.requires_grad or is_transformed(anchor):
        return [run.of_matrix(anchor, blocks) for run in runs]
    entries = [diagonal_blocks(blocks, run, anchor) for run in runs]
    dtype = product_dtype(anchor.dtype, anchor.device.type)
    return [part.to(dtype).contiguous() for part in entries] if anchor.dtype.itemsize == 2 else entries


def shared(x: Tensor, factors: Callable[[], Gathered], diagonal: Diagonal | Callable[[], Diagonal]) -> Tensor:
    """`x ΔWᵀ` with each group's own ΔW: (groups, tokens, out_features) in the dtype of x.

    Differentiable in x, the factors and M.

    Args:
        x: (groups, tokens, in_features).
        factors: Gathers those of each group.
        diagonal: The blocks of M, or what gives them: the backward then calls this again, so that nothing of M's
            size is kept.
    """

    chosen = factors()  # the backward takes those of the forward, whatever is written to the factors meanwhile

    def products(x: Tensor) -> Tensor:
        own = diagonal() if callable(diagonal) else diagonal
        found = _products(own, own.blocks.sort_inputs(x), chosen)
        outputs = [z if B is None else (B * z).sum(2).flatten(2) for _, B, z in found]
        return own.blocks.unsort_outputs(torch.cat(outputs, dim=-1).to(x.dtype))

    return checkpointed(products, x) if callable(diagonal) and not is_transformed(x) else products(x)


def add_shared(total: Tensor, x: Tensor, factors: Gathered, diagonal: Diagonal, slots: Tensor | None = None) -> None:
    """Add what `shared` gives to `total`, (groups, tokens, out_features), without gradients.

    `slots` are those of each group among `factors`; None if these are in the order of the groups.
    """
    takes_skinny_products = diagonal.entries is None and slots is None
    pieces = _pieces(x, 1 if takes_skinny_products else max(run.rank for run in diagonal.runs))
    if slots is None and len(pieces) == 1:
        _add_piece(total, x, factors, diagonal)
        return
    for groups, tokens in pieces:
        own = of_slots(factors, groups if slots is None else slots[groups])
        _add_piece(total[groups, tokens], x[groups, tokens], own, diagonal)


def _pieces(x: Tensor, rank: int) -> list[tuple[slice, slice]]:
    """Some groups and tokens of x (groups, tokens, in_features) after the other."""
    groups, tokens = x.shape[:2]
    size = max(1, (MOST_PRODUCTS if x.device.type == "cpu" else MOST_ON_GPU) // max(1, rank))
    step = max(1, size // max(1, tokens))
    starts = product(range(0, groups, step), range(0, tokens, size))
    return [(slice(group, group + step), slice(token, token + size)) for group, token in starts]


def formed(x: Tensor, factors: Gathered, diagonal: Diagonal) -> Tensor:
    """`x ΔWᵀ` of one group, whose ΔW is formed: (tokens, out_features) in the dtype of x.

    Cheaper than `shared` for many tokens; not differentiable.

    Args:
        x: (tokens, in_features).
        factors: The group's.
        diagonal: The blocks of M, which there is.
    """
    dtype, deltas = product_dtype(x.dtype, x.device.type), []
    with without_autocast(x.device.type):
        for run, own, entries in zip(diagonal.runs, factors, diagonal.entries or (), strict=True):
            A, B = (part[0, 0].transpose(0, 1) for part in own)
            deltas.append((run, torch.bmm(B.mT, A.to(B.dtype)).mul_(entries).to(dtype)))
        return multiply(x, diagonal.blocks, deltas)


def _add_piece(total: Tensor, x: Tensor, factors: Gathered, diagonal: Diagonal) -> None:
    """Add `x ΔWᵀ` to `total`, in few operations."""
    blocks = diagonal.blocks
    y = total if blocks.is_contiguous else x.new_zeros(*x.shape[:2], len(blocks.orders.rows))
    for run, B, z in _products(diagonal, sort_columns(blocks, x, blocks.orders.cols), factors):
        own = y.narrow(2, run.first_row, run.count * run.height)
        if B is None:
            own.add_(z)
            continue
        own = own.view(*own.shape[:2], 1, run.count, run.height)
        if run.rank == 1:
            own.addcmul_(B, z)
        else:
            own.add_((B * z).sum(2, keepdim=True))
    if not blocks.is_contiguous:
        total.add_(sort_columns(blocks, y, blocks.orders.rows_inverse))


def _products(diagonal: Diagonal, x: Tensor, factors: Gathered) -> Iterator[tuple[BlockRun, Tensor | None, Tensor]]:
    """B of each run, and what it is to be multiplied with and summed over the ranks; None and `x ΔWᵀ` without M. x is
    sorted by block."""
    dtype = product_dtype(x.dtype, x.device.type)
    of_runs = diagonal.entries or repeat(None, len(diagonal.runs))
    for run, (A, B), entries in zip(diagonal.runs, factors, of_runs, strict=True):
        if entries is None:
            inputs = _inputs(run, x).transpose(1, 3).squeeze(2)  # (groups, blocks, tokens, width)
            A, B = (part.squeeze(1).transpose(1, 2).to(x.dtype) for part in (A, B))
            yield run, None, (inputs @ A.mT @ B).transpose(1, 2).flatten(2)
            continue
        with without_autocast(x.device.type):  # every dtype is chosen here
            z = _multiplied(A * _inputs(run, x), entries, dtype)
        yield run, B, z


def _multiplied(values: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Each block's values times its entries (blocks, height, width): (groups, tokens, rank, blocks, height)."""
    groups, tokens, rank, blocks, _ = values.shape
    if not values.dtype == entries.dtype == dtype:
        values, entries = values.to(dtype), entries.to(dtype)
    values = values.reshape(-1, blocks, values.shape[-1]).transpose(0, 1)  # a copy if x is a transposed view
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
