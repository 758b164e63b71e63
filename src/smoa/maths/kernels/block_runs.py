"""Runs of blocks of one shape, whose products are one batched product.

Block sizes and ranks differ by at most one, and the larger ones come first, so that there are at most four runs. Ranks
by block (`block_ranks`) may make more. Where K divides m, n and r there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks, Orders, block_sizes
from smoa.maths.factors import Factors


@dataclass(frozen=True)
class BlockRun:
    """Neighboring blocks of one height, width and rank: where they are in the sorted rows, columns and ranks.

    The methods return views (blocks, …, …).
    """

    count: int
    height: int
    width: int
    rank: int
    first_row: int
    first_col: int
    first_rank: int

    def of_inputs(self, x: Tensor) -> Tensor:
        """(blocks, tokens, width), of x (tokens, in_features) sorted by block."""
        columns = x.narrow(1, self.first_col, self.count * self.width)
        return columns.view(x.shape[0], self.count, self.width).transpose(0, 1)

    def of_outputs(self, y: Tensor) -> Tensor:
        """(blocks, tokens, height), of y (tokens, out_features) sorted by block."""
        columns = y.narrow(1, self.first_row, self.count * self.height)
        return columns.view(y.shape[0], self.count, self.height).transpose(0, 1)

    def of_A(self, A: Tensor) -> Tensor:
        """(blocks, rank, width), of A (r, ⌈n/K⌉)."""
        ranks = A.narrow(0, self.first_rank, self.count * self.rank).narrow(1, 0, self.width)
        return ranks.view(self.count, self.rank, self.width)

    def of_B(self, B: Tensor) -> Tensor:
        """(blocks, height, rank), of B (⌈m/K⌉, r)."""
        ranks = B.narrow(1, self.first_rank, self.count * self.rank).narrow(0, 0, self.height)
        return ranks.view(self.height, self.count, self.rank).transpose(0, 1)

    def of_slices(self, matrix: Tensor) -> Tensor:
        """(blocks, height, width), of a matrix (out_features, in_features) whose blocks are contiguous."""
        rows = matrix.narrow(0, self.first_row, self.count * self.height)
        square = rows.narrow(1, self.first_col, self.count * self.width)
        square = square.view(self.count, self.height, self.count, self.width)
        return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def of_matrix(self, matrix: Tensor, blocks: Blocks) -> Tensor:
        """(blocks, height, width), differentiable: a view if the blocks are contiguous, else a copy."""
        return self.of_slices(matrix) if blocks.is_contiguous else matrix[self.indices(blocks.orders)]

    def indices(self, orders: Orders) -> tuple[Tensor, Tensor]:
        """The places of the blocks' entries in a matrix: rows (blocks, height, 1) and columns (blocks, 1, width)."""
        rows = orders.rows.narrow(0, self.first_row, self.count * self.height)
        cols = orders.cols.narrow(0, self.first_col, self.count * self.width)
        return rows.view(self.count, self.height, 1), cols.view(self.count, 1, self.width)


def runs_of(factors: Factors) -> tuple[BlockRun, ...]:
    """The runs of blocks of one shape, in order."""
    sizes = factors.blocks.out_features, factors.blocks.in_features, tuple(factors.ranks)
    return _runs(*sizes) if torch.compiler.is_compiling() else _cached_runs(*sizes)  # which would trace the cache


def _runs(out_features: int, in_features: int, ranks: tuple[int, ...]) -> tuple[BlockRun, ...]:
    num_blocks = len(ranks)
    shapes = zip(block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks), ranks, strict=True)
    runs, row, col, first_rank = [], 0, 0, 0
    for (height, width, rank), blocks in groupby(shapes):
        run = BlockRun(len(list(blocks)), height, width, rank, row, col, first_rank)
        runs.append(run)
        row, col, first_rank = row + run.count * height, col + run.count * width, first_rank + run.count * rank
    return tuple(runs)


_cached_runs = lru_cache(maxsize=4096)(_runs)
