from __future__ import annotations

import pytest
import torch

from smoa.errors import PartitionError
from smoa.maths.experts import stack_partition
from smoa.maths.spectrum import spectral_scores
from tests import reference

K = 3


def matrices() -> torch.Tensor:
    return torch.randn(4, 2, 11, 13, dtype=torch.float64)


def test_each_matrix_gets_the_oracles_partition_of_it() -> None:
    weights = matrices()
    rows, cols = stack_partition(weights, K, "spectral", "each", spectral_scores)
    found = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert found == [reference.spectral_labels(weight, K) for weight in weights.flatten(0, 1)]
    assert rows.dtype == torch.uint8


def test_a_shared_partition_is_that_of_all_experts_matrices_beside_and_above_each_other() -> None:
    weights = matrices()
    rows, cols = stack_partition(weights, K, "spectral", "shared", spectral_scores)
    for half in range(2):
        stack = weights[:, half]
        assert rows[half].tolist() == reference.spectral_labels(torch.cat(list(stack), dim=1), K)[0]
        assert cols[half].tolist() == reference.spectral_labels(torch.cat(list(stack)), K)[1]


def test_a_shared_partition_of_one_expert_is_its_own() -> None:
    weights = matrices()[:1]
    shared = stack_partition(weights, K, "spectral", "shared", spectral_scores)
    each = stack_partition(weights, K, "spectral", "each", spectral_scores)
    assert all(torch.equal(a, b) for a, b in zip(shared, each, strict=True))


@pytest.mark.parametrize("expert_partition", ["each", "shared"])
def test_contiguous_blocks_decompose_nothing(expert_partition: str) -> None:
    def refuse(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("a weight was decomposed")

    rows, cols = stack_partition(matrices(), K, "contiguous", expert_partition, refuse)  # type: ignore[arg-type]
    assert all(row == reference.contiguous_labels(11, K) for row in rows.tolist())
    assert all(col == reference.contiguous_labels(13, K) for col in cols.tolist())


@pytest.mark.parametrize("expert_partition", ["each", "shared"])
def test_a_weight_that_is_not_finite_is_refused(expert_partition: str) -> None:
    weights = matrices()
    weights[2, 1, 3, 4] = float("nan")
    with pytest.raises(PartitionError, match="NaN or infinite"):
        stack_partition(weights, K, "spectral", expert_partition, spectral_scores)  # type: ignore[arg-type]
