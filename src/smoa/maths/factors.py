"""The low-rank part of an update: compact factors of all K blocks, and their scale.

    A: (r, ⌈n/K⌉)   block k owns r_k rows, and uses their first |J_k| columns
    B: (⌈m/K⌉, r)   block k owns r_k columns, and uses their first |I_k| rows

Smaller blocks are padded by one entry, which stays zero. Ã: (r, n) and B̃: (m, r) are the factors scattered to full
size: each row of Ã and column of B̃ is non-zero on its own block only. So B̃Ã is zero off the diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks, block_sizes, slices

Initialization = bool | Literal["zero_A"]


def split_rank(r: int, num_blocks: int) -> tuple[int, ...]:
    """Ranks of the blocks if r is split evenly; the first blocks get the remainder."""
    return block_sizes(r, num_blocks)


def factor_shapes(out_features: int, in_features: int, ranks: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A (r, ⌈n/K⌉) and B (⌈m/K⌉, r)."""
    num_blocks, r = len(ranks), sum(ranks)
    return (r, -(-in_features // num_blocks)), (-(-out_features // num_blocks), r)


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors and scale of all blocks, for `s_k·B_k A_k` with `s_k = scaling·rank_scale`.

    Args:
        A: (r, ⌈n/K⌉).
        B: (⌈m/K⌉, r).
        ranks: r_k of every block.
        scaling: α/r, the part of the scale that comes from the config.
        rank_scale: The part of the scale that comes from the weight, for each column of B: (r,) float32.
        blocks: The coordinates of the blocks.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: float
    rank_scale: Tensor
    blocks: Blocks

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products of the factors: float32 or wider."""
        return torch.promote_types(self.A.dtype, torch.float32)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """s_k for each column of B that block k owns: (r,)."""
        return self.rank_scale.to(dtype) * self.scaling

    def wide(self, dtype: torch.dtype | None = None) -> Factors:
        """The factors in `dtype` (default: float32 or wider), with the scale multiplied into B."""
        dtype = dtype or self.dtype
        B = self.B.to(dtype) * self.scale(dtype)
        return Factors(self.A.to(dtype), B, self.ranks, 1.0, torch.ones_like(self.rank_scale), self.blocks)

    def slots(self) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of every block: of `orders.rows`, of `orders.cols`, and of the ranks."""
        return zip(self.blocks.row_slices, self.blocks.col_slices, slices(self.ranks), strict=True)

    def spread_A(self, stacked: bool = False) -> Tensor:
        """Ã: (r, in_features) in natural column order, zero outside each block's own columns.

        Args:
            stacked: Every block uses the first r_k rows instead of rows of its own: (max r_k, in_features).
        """
        spread = self.A.new_zeros(self._height(stacked), self.blocks.in_features)
        for _, cols, ranks in self.slots():
            spread[_rows(ranks, stacked), cols] = self.A[ranks, : cols.stop - cols.start]
        return spread if self.blocks.is_contiguous else spread.index_select(1, self.blocks.orders.cols_inverse)

    def spread_B(self, stacked: bool = False) -> Tensor:
        """B̃: (out_features, r) in natural row order, without the scale; `stacked` as in `spread_A`."""
        spread = self.B.new_zeros(self.blocks.out_features, self._height(stacked))
        for rows, _, ranks in self.slots():
            spread[rows, _rows(ranks, stacked)] = self.B[: rows.stop - rows.start, ranks]
        return spread if self.blocks.is_contiguous else spread.index_select(0, self.blocks.orders.rows_inverse)

    def _height(self, stacked: bool) -> int:
        return max(self.ranks) if stacked else sum(self.ranks)


def _rows(ranks: slice, stacked: bool) -> slice:
    return slice(0, ranks.stop - ranks.start) if stacked else ranks


def init_factors(
    A: Tensor, B: Tensor, sizes: tuple[int, int], ranks: Sequence[int], init: Initialization, relative_size: float
) -> None:
    """Initialize A and B in place.

    Args:
        A: (r, ⌈n/K⌉).
        B: (⌈m/K⌉, r).
        sizes: (out_features, in_features).
        ranks: r_k of every block.
        init: True makes `A_k` uniform on ±1/√|J_k|, as `nn.Linear` does, and `B_k` zero, so ΔW is zero. "zero_A" makes
            `A_k` zero and `B_k` uniform on ±1/√r_k, so ΔW is zero too. False makes both random.
        relative_size: rms of the entries of `B_k A_k` if `init` is False.
    """
    A.zero_()
    B.zero_()
    heights, widths = (block_sizes(size, len(ranks)) for size in sizes)
    for height, width, block in zip(heights, widths, slices(ranks), strict=True):
        rank = block.stop - block.start
        block_A, block_B = A[block, :width], B[:height, block]
        if init == "zero_A":
            block_B.uniform_(-1, 1).mul_(max(rank, 1) ** -0.5)
            continue
        block_A.uniform_(-(width**-0.5), width**-0.5)
        if not init and rank:
            block_B.normal_(std=relative_size * (3 * width / rank) ** 0.5)
