"""The low-rank part of an update: compact factors of all K blocks, and their scale.

    A: (r, ⌈n/K⌉)   block k owns r_k rows, and uses their first |J_k| columns
    B: (⌈m/K⌉, r)   block k owns r_k columns, and uses their first |I_k| rows

Smaller blocks are padded by one entry, which stays zero. Ã: (r, n) and B̃: (m, r) are the factors scattered to full
size: each row of Ã and column of B̃ is non-zero on its own block only. So B̃Ã is zero off the diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from smoa.kernels.scale import ModulationKind, as_dtype, rank_scale, whole_scale
from smoa.partition import Blocks, Orders, block_sizes, slices

Initialization = bool | Literal["zero_A"]


def saved_shapes(shape: tuple[int, int], ranks: Sequence[int], count: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Shapes of A, B, row labels, column labels and block scales in the file of an adapter of a W of `shape`, or of a
    stack of `count` of them."""
    (out_features, in_features), K, r = shape, len(ranks), sum(ranks)
    stack, rows = ((), r) if count is None else ((count,), count * r)
    A, B = (rows, -(-in_features // K)), (-(-out_features // K), rows)
    return A, B, (*stack, out_features), (*stack, in_features), (*stack, K)


@dataclass(frozen=True)
class BlockRun:
    """Neighboring blocks of one height, width and rank: where they are in the sorted rows, columns and ranks.

    The methods return views (blocks, …, …). A piece of a larger block has `height` of its rows, after those it skips.
    Where all blocks of a weight have one shape, one run `is_all` of them.
    """

    count: int
    height: int
    width: int
    rank: int
    first_row: int
    first_col: int
    first_rank: int
    skipped: int = 0
    is_all: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, height, width)."""
        return self.count, self.height, self.width

    def cut(self, rows: int) -> Iterator[BlockRun]:
        """Pieces with at most so many rows: fewer blocks or, of a higher block, a part."""
        if self.count * self.height <= rows:
            yield self
            return
        blocks = max(1, rows // self.height)
        for first in range(0, self.count, blocks):
            places = self.first_row + first * self.height, self.first_col + first * self.width
            rank = self.first_rank + first * self.rank
            for skipped in range(0, self.height, rows):
                count, height = min(blocks, self.count - first), min(rows, self.height - skipped)
                yield BlockRun(count, height, self.width, self.rank, places[0] + skipped, places[1], rank, skipped)

    def _of(self, tensor: Tensor, dim: int, start: int, size: int) -> Tensor:
        """A part of a tensor, of which a run that has all blocks takes all: a view less in each call."""
        return tensor if self.is_all else tensor.narrow(dim, start, size)

    def of_inputs(self, x: Tensor) -> Tensor:
        """(blocks, tokens, width), of x (tokens, in_features) sorted by block."""
        columns = self._of(x, 1, self.first_col, self.count * self.width)
        return columns.view(x.shape[0], self.count, self.width).transpose(0, 1)

    def of_outputs(self, y: Tensor) -> Tensor:
        """(blocks, tokens, height), of y (tokens, out_features) sorted by block."""
        columns = self._of(y, 1, self.first_row, self.count * self.height)
        return columns.view(y.shape[0], self.count, self.height).transpose(0, 1)

    def of_A(self, A: Tensor) -> Tensor:
        """(blocks, rank, width), of A (r, ⌈n/K⌉)."""
        ranks = self._of(self._of(A, 0, self.first_rank, self.count * self.rank), 1, 0, self.width)
        return ranks.view(self.count, self.rank, self.width)

    def of_B(self, B: Tensor) -> Tensor:
        """(blocks, height, rank), of B (⌈m/K⌉, r)."""
        ranks = self._of(self._of(B, 1, self.first_rank, self.count * self.rank), 0, self.skipped, self.height)
        return ranks.view(self.height, self.count, self.rank).transpose(0, 1)

    def of_slices(self, matrix: Tensor) -> Tensor:
        """(blocks, height, width), of a matrix (out_features, in_features) whose blocks are contiguous."""
        rows = self._of(matrix, 0, self.first_row, self.count * self.height)
        square = self._of(rows, 1, self.first_col, self.count * self.width)
        square = square.view(self.count, self.height, self.count, self.width)
        return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def of_matrix(self, matrix: Tensor, blocks: Blocks) -> Tensor:
        """(blocks, height, width), differentiable: a view if the blocks are contiguous, else a copy."""
        return self.of_slices(matrix) if blocks.is_contiguous else matrix[self.indices(blocks.orders)]

    def indices(self, orders: Orders) -> tuple[Tensor, Tensor]:
        """The places of the blocks' entries in a matrix: rows (blocks, height, 1) and columns (blocks, 1, width)."""
        rows = self._of(orders.rows, 0, self.first_row, self.count * self.height)
        cols = self._of(orders.cols, 0, self.first_col, self.count * self.width)
        return rows.view(self.count, self.height, 1), cols.view(self.count, 1, self.width)


def _runs_of(out_features: int, in_features: int, ranks: tuple[int, ...]) -> tuple[BlockRun, ...]:
    num_blocks = len(ranks)
    shapes = zip(block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks), ranks, strict=True)
    runs, row, col, first_rank = [], 0, 0, 0
    for (height, width, rank), blocks in groupby(shapes):
        run = BlockRun(len(list(blocks)), height, width, rank, row, col, first_rank)
        runs.append(run)
        row, col, first_rank = row + run.count * height, col + run.count * width, first_rank + run.count * rank
    return (replace(runs[0], is_all=True),) if len(runs) == 1 else tuple(runs)


_cached_runs = lru_cache(maxsize=4096)(_runs_of)


def runs_of(out_features: int, in_features: int, ranks: tuple[int, ...]) -> tuple[BlockRun, ...]:
    """The runs of blocks of one shape, in order."""
    make = _runs_of if torch.compiler.is_compiling() else _cached_runs  # a compiler would trace the cache
    return make(out_features, in_features, ranks)


@dataclass(eq=False)
class Factors:
    """Factors and scale of all blocks, for `s_k·B_k A_k` with `s_k = scaling·rank_scale`.

    Args:
        A: (r, ⌈n/K⌉).
        B: (⌈m/K⌉, r).
        ranks: r_k of every block.
        scaling: α/r, the part of the scale that comes from the config.
        rank_scale: The part of the scale that comes from the weight, for each column of B: (r,) float32.
        blocks: The coordinates of the blocks.
        modulation: "hadamard" for M = W, "none" without M.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: float
    rank_scale: Tensor
    blocks: Blocks
    modulation: ModulationKind = "hadamard"

    def with_factors(self, A: Tensor | None, B: Tensor | None) -> Self:
        """The same with other factors."""
        return type(self)(A, B, self.ranks, self.scaling, self.rank_scale, self.blocks, self.modulation)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products of the factors: float32 or wider."""
        return torch.promote_types(self.A.dtype, torch.float32)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """s_k for each column of B that block k owns: (r,)."""
        return whole_scale(self.rank_scale, self.scaling, dtype)

    @property
    def trains(self) -> bool:
        """Whether A or B gets a gradient."""
        return self.A.requires_grad or self.B.requires_grad

    def runs(self) -> tuple[BlockRun, ...]:
        """The runs of blocks of one shape, in order."""
        return runs_of(*self.blocks.shape, tuple(self.ranks))

    def scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A, and B times the scale, which is multiplied in float32 or wider, in `dtype`."""
        wide = torch.promote_types(self.dtype, dtype)
        return as_dtype(self.A, dtype), as_dtype(self.B * self.scale(wide), dtype)

    def spread(self, dtype: torch.dtype, stacked: bool = False) -> tuple[Tensor, Tensor]:
        """Ã (r, in_features) and B̃ (out_features, r) with the scale, in `dtype`, both in natural order.

        Each row of Ã and column of B̃ is zero outside its block's own coordinates.

        Args:
            dtype: As in `scaled`.
            stacked: Every block uses the first r_k ranks instead of ranks of its own: (max r_k, …) and (…, max r_k).
        """
        A, B = self.scaled(dtype)
        return self._spread(A, False, stacked), self._spread(B.T, True, stacked).T.contiguous()

    def spread_rows(self, dtype: torch.dtype, rows: Tensor, stacked: bool = False) -> tuple[Tensor, Tensor]:
        """Ã, and the rows of B̃ of these numbers, int (rows,): what `spread` gives, without forming B̃."""
        (A, B), blocks = self.scaled(dtype), self.blocks
        block = blocks.row_labels[rows].long()
        size, larger = divmod(blocks.out_features, blocks.num_blocks)
        place = blocks.orders.rows_inverse[rows] - block * size - block.clamp(max=larger)  # in its block
        owner = rank_scale(torch.arange(blocks.num_blocks, device=rows.device), self.ranks)  # of each rank
        rows_of_B = torch.where(block[:, None] == owner, F.embedding(place, B), 0)
        if stacked:  # the others are zero
            within = torch.tensor([rank for own in self.ranks for rank in range(own)], device=rows.device)
            rows_of_B = B.new_zeros(len(rows), max(self.ranks)).index_add(1, within, rows_of_B)
        return self._spread(A, False, stacked), rows_of_B

    def _spread(self, factor: Tensor, of_rows: bool, stacked: bool) -> Tensor:
        """A factor (r, largest block), of the coordinates of rows or of columns, as (ranks, features)."""
        blocks = self.blocks
        size = blocks.out_features if of_rows else blocks.in_features
        spread = factor.new_zeros(max(self.ranks) if stacked else sum(self.ranks), size)
        for run in self.runs():  # a device starts as many operations for any K
            first, width = (run.first_row, run.height) if of_rows else (run.first_col, run.width)
            by_block = spread.narrow(1, first, run.count * width).unflatten(1, (run.count, width))
            ranks = run.first_rank, run.count * run.rank
            own = factor.narrow(0, *ranks).narrow(1, 0, width).unflatten(0, (run.count, run.rank))
            if stacked:
                by_block.narrow(0, 0, run.rank).copy_(own.transpose(0, 1))
            else:
                by_block = by_block.narrow(0, *ranks).unflatten(0, (run.count, run.rank))
                by_block.diagonal(dim1=0, dim2=2).copy_(own.permute(1, 2, 0))
        order = blocks.orders.rows_inverse if of_rows else blocks.orders.cols_inverse
        return spread if blocks.is_contiguous else spread.index_select(1, order)


def init_factors(
    A: Tensor, B: Tensor, sizes: tuple[int, int], ranks: Sequence[int], init: Initialization, relative_size: float
) -> None:
    """Initialize A (r, ⌈n/K⌉) and B (⌈m/K⌉, r) in place, for W of `sizes` and r_k of every block.

    Args:
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
