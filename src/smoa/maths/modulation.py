r"""The maths of one layer: how compact factors make up ΔW.

    ΔW[I_k, J_k] = s·(B_k A_k) ⊙ W[I_k, J_k],   s = α/r,   zero off the diagonal blocks   (arXiv:2605.21147)

`modulation="none"` leaves out `⊙ W`, `"noise"` puts noise of W's norm in its place. All K blocks live in two
LoRA-like factors,

    A: (r, ⌈n/K⌉)   block k owns rows `rank_slices[k]`, of which the first |J_k| columns count
    B: (⌈m/K⌉, r)   block k owns columns `rank_slices[k]`, of which the first |I_k| rows count

and within a block coordinates stay in ascending natural order. Ragged blocks pad by one entry, which stays zero.

With A and B scattered to Ã: (r, n) and B̃: (m, r), each row and column non-zero in its own block's slots only, the
diagonal blocks are all that is left of the product: `ΔW = s·W ⊙ (B̃Ã)` exactly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from smoa.errors import ConfigError
from smoa.maths.spectrum import SpectralPartition, block_sizes

Modulation = Literal["hadamard", "none", "noise"]
Initialisation = bool | Literal["zero_A"]


def split_rank(r: int, num_blocks: int) -> tuple[int, ...]:
    """Ranks of the blocks when r is split evenly, the remainder going to the first blocks."""
    return tuple(block_sizes(r, num_blocks))


def check_block_ranks(ranks: tuple[int, ...], r: int, num_blocks: int) -> None:
    """Raise ConfigError unless `ranks` has one non-negative integer for each block and sums to r."""
    if len(ranks) != num_blocks:
        raise ConfigError(f"block_ranks={list(ranks)} has {len(ranks)} entries, expected num_blocks={num_blocks}")
    if any(type(rank) is not int or rank < 0 for rank in ranks):
        raise ConfigError(f"block_ranks={list(ranks)} must be non-negative integers")
    if sum(ranks) != r:
        raise ConfigError(f"block_ranks={list(ranks)} sums to {sum(ranks)}, expected r={r}")


@dataclass(frozen=True)
class BlockLayout:
    """Sizes of the K blocks of one layer and where each lies in the sorted coordinates and in the factors."""

    out_features: int
    in_features: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor, ranks: Sequence[int]) -> BlockLayout:
        """Layout of a weight (out_features, in_features)."""
        return cls(weight.shape[0], weight.shape[1], tuple(ranks))

    @property
    def num_blocks(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def shape_A(self) -> tuple[int, int]:
        """(r, ⌈n/K⌉)"""
        return self.rank, -(-self.in_features // self.num_blocks)

    @property
    def shape_B(self) -> tuple[int, int]:
        """(⌈m/K⌉, r)"""
        return -(-self.out_features // self.num_blocks), self.rank

    def row_slices(self) -> list[slice]:
        """Block k's output coordinates among all of them sorted by block."""
        return _slices(block_sizes(self.out_features, self.num_blocks))

    def col_slices(self) -> list[slice]:
        """Block k's input coordinates among all of them sorted by block."""
        return _slices(block_sizes(self.in_features, self.num_blocks))

    def rank_slices(self) -> list[slice]:
        """Block k's rows of A and columns of B."""
        return _slices(self.ranks)

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """(rows, cols, ranks) of every block."""
        return zip(self.row_slices(), self.col_slices(), self.rank_slices(), strict=True)


def _slices(sizes: list[int] | tuple[int, ...]) -> list[slice]:
    stops = list(accumulate(sizes))
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def sorted_order(labels: Tensor) -> Tensor:
    """Coordinates sorted by block, ascending within a block: int64 (size,)."""
    return torch.argsort(labels, stable=True)


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: `x[order][inverse_order(order)]` is x."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def spread_A(A: Tensor, layout: BlockLayout, col_order: Tensor, stacked: bool = False) -> Tensor:
    """Ã: (r, in_features) in natural column order, zero outside each block's own slots.

    `stacked`: every block takes the first r_k rows instead of rows of its own: (max r_k, in_features).
    """
    spread = A.new_zeros(max(layout.ranks) if stacked else layout.rank, layout.in_features)
    for _, cols, ranks in layout.blocks():
        spread[_slots(ranks, stacked), cols] = A[ranks, : cols.stop - cols.start]
    return spread.index_select(1, inverse_order(col_order))


def spread_B(B: Tensor, layout: BlockLayout, row_order: Tensor, stacked: bool = False) -> Tensor:
    """B̃: (out_features, r) in natural row order, zero outside each block's own slots; `stacked` as in `spread_A`."""
    spread = B.new_zeros(layout.out_features, max(layout.ranks) if stacked else layout.rank)
    for rows, _, ranks in layout.blocks():
        spread[rows, _slots(ranks, stacked)] = B[: rows.stop - rows.start, ranks]
    return spread.index_select(0, inverse_order(row_order))


def _slots(ranks: slice, stacked: bool) -> slice:
    return slice(0, ranks.stop - ranks.start) if stacked else ranks


def delta_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    partition: SpectralPartition,
    ranks: tuple[int, ...],
    scaling: float,
    modulation: Modulation = "hadamard",
) -> Tensor:
    """Dense ΔW: (out_features, in_features), in the widest of float32 and the dtypes of `weight` and the factors.

    Args:
        weight: pristine W (out_features, in_features).
        A: (r, ⌈n/K⌉).
        B: (⌈m/K⌉, r).
        ranks: r_k of every block.
        scaling: s = α/r.
    """
    layout = BlockLayout.of(weight, ranks)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    spread_b = spread_B(B.to(dtype) * scaling, layout, sorted_order(partition.row_labels))
    delta = spread_b @ spread_A(A.to(dtype), layout, sorted_order(partition.col_labels))
    if modulation == "noise":
        weight = noise_like(weight, partition.row_labels, partition.col_labels)
    return delta if modulation == "none" else delta.mul_(weight)


def noise_like(weight: Tensor, row_labels: Tensor, col_labels: Tensor) -> Tensor:
    """Gaussian noise with the shape, dtype, device and Frobenius norm of `weight`, drawn by a seed made of the labels:
    the same wherever the adapter is loaded. What is left of the method without W's own entries."""
    seed = zlib.crc32(torch.cat([row_labels, col_labels]).cpu().numpy().tobytes())
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return noise.mul_(rms_of(weight) / rms_of(noise)).to(weight.device, weight.dtype)


def rms_of(weight: Tensor) -> float:
    """The root mean square of the entries."""
    return float(torch.linalg.vector_norm(weight.detach().float())) / math.sqrt(weight.numel())


def init_factors(A: Tensor, B: Tensor, layout: BlockLayout, init: Initialisation, relative_size: float) -> None:
    """Fill A and B in place.

    True: `A_k` is uniform on ±1/√|J_k| (as `nn.Linear`) and `B_k` zero, a no-op. "zero_A", the other way round, a no-op
    too: `B_k` is uniform on ±1/√r_k. False: both random, so that the entries of `B_k A_k` have rms `relative_size`.
    """
    A.zero_()
    B.zero_()
    for rows, cols, ranks in layout.blocks():
        width, rank = cols.stop - cols.start, ranks.stop - ranks.start
        block_A, block_B = A[ranks, :width], B[: rows.stop - rows.start, ranks]
        if init == "zero_A":
            block_B.uniform_(-1, 1).mul_(max(rank, 1) ** -0.5)
            continue
        block_A.uniform_(-(width**-0.5), width**-0.5)
        if not init and rank:
            block_B.normal_(std=relative_size * (3 * width / rank) ** 0.5)


def plain_branch(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor | None,
    row_labels: Tensor,
    col_labels: Tensor,
    layout: BlockLayout,
    scaling: float,
) -> Tensor:
    """`x ΔWᵀ` in differentiable operations alone, (…, out_features): without modulation when `weight` is None.

    With a weight autograd keeps the K modulated blocks, 1/K of W, but every transform and derivative goes through,
    that of W included.
    """
    row_order, col_order = sorted_order(row_labels), sorted_order(col_labels)
    x = x.index_select(-1, col_order)
    outputs = []
    for rows, cols, ranks in layout.blocks():
        block_A, block_B = A[ranks, : cols.stop - cols.start], B[: rows.stop - rows.start, ranks]
        if weight is None:
            outputs.append(x[..., cols] @ block_A.T @ block_B.T)
        else:
            anchor = weight.index_select(0, row_order[rows]).index_select(1, col_order[cols])
            outputs.append(x[..., cols] @ (block_B @ block_A * anchor).to(x.dtype).T)
    return torch.cat(outputs, dim=-1).index_select(-1, inverse_order(row_order)) * scaling
