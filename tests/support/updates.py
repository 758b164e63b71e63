"""A random update of one weight, and what the oracle says about it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smoa.kernels.factors import Factors
from smoa.kernels.one_product import Update
from smoa.partition import Blocks
from smoa.spectrum import make_partition
from tests import oracle

# (out_features, in_features, block_ranks): square, tall, wide, ragged, r that K does not divide, unequal, an empty one.
CASES = [
    (12, 12, (2, 2, 2)),
    (17, 10, (2, 1, 1, 1)),
    (9, 16, (3, 3)),
    (11, 13, (1, 4, 2)),
    (8, 8, (3, 0)),
    (7, 6, (1,) * 6),
    (5, 9, (4,)),
]


class Problem(NamedTuple):
    weight: Tensor
    A: Tensor
    B: Tensor
    partition: Blocks
    ranks: tuple[int, ...]

    def factors(self, scaling: float = 1.0, block_scale: Sequence[float] | None = None) -> Factors:
        block_scale = block_scale or [1.0] * len(self.ranks)
        rank_scale = [s for s, rank in zip(block_scale, self.ranks, strict=True) for _ in range(rank)]
        return Factors(self.A, self.B, self.ranks, scaling, torch.tensor(rank_scale), self.partition)

    def update(self, modulation: str, scaling: float = 1.0, block_scale: Sequence[float] | None = None) -> Update:
        return Update(**{**vars(self.factors(scaling, block_scale)), "modulation": modulation})  # type: ignore[arg-type]

    def smoa(self, modulation: str, scaling: float = 1.0) -> Tensor:
        return self.update(modulation, scaling).delta(self.weight)

    def oracle(self, modulation: str, scaling: float | Sequence[float] = 1.0) -> Tensor:
        row_labels, col_labels = self.partition.row_labels.tolist(), self.partition.col_labels.tolist()
        return oracle.delta_weight(self.weight, self.A, self.B, row_labels, col_labels, self.ranks, scaling, modulation)

    def double(self) -> "Problem":
        return Problem(*(tensor.double() for tensor in self[:3]), self.partition, self.ranks)


def problem(out_features: int, in_features: int, ranks: tuple[int, ...], kind: str = "spectral") -> Problem:
    """Normal numbers in float64; the factors need gradients."""
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    A_shape, B_shape = oracle.factor_shapes(out_features, in_features, len(ranks), sum(ranks))
    A = torch.randn(A_shape, dtype=torch.float64, requires_grad=True)
    B = torch.randn(B_shape, dtype=torch.float64, requires_grad=True)
    return Problem(weight, A, B, make_partition(weight, len(ranks), kind), ranks)  # type: ignore[arg-type]
