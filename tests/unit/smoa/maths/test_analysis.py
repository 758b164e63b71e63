from __future__ import annotations

import pytest
import torch

from smoa.errors import PartitionError
from smoa.maths.analysis import effective_rank, numerical_rank, update_spectrum


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 7, dtype=torch.float64)


def test_an_update_along_one_direction_has_all_its_energy_there(weight: torch.Tensor) -> None:
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    found = update_spectrum(weight, 0.5 * torch.outer(U[:, 2], Vh[2]))
    assert found.rank == 1
    assert found.effective_rank == pytest.approx(1.0)
    assert found.coverage == pytest.approx(2 / 7)
    assert found.input_energy[2] == pytest.approx(1.0)
    assert found.output_energy[2] == pytest.approx(1.0)


def test_an_update_in_all_directions_alike_covers_half(weight: torch.Tensor) -> None:
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    found = update_spectrum(weight, U @ Vh)
    assert found.rank == 7
    assert found.effective_rank == pytest.approx(7.0)
    assert found.coverage == pytest.approx(3 / 7)


def test_an_update_of_zero_has_no_rank_and_no_coverage(weight: torch.Tensor) -> None:
    found = update_spectrum(weight, torch.zeros_like(weight))
    assert (found.rank, found.effective_rank, found.coverage) == (0, 0.0, 0.0)


def test_ranks_of_no_singular_values_are_zero() -> None:
    assert numerical_rank(torch.empty(0)) == 0
    assert effective_rank(torch.empty(0)) == 0.0


def test_another_shape_is_no_update(weight: torch.Tensor) -> None:
    with pytest.raises(PartitionError, match=r"delta_weight has shape \(7, 12\), but the weight has shape \(12, 7\)"):
        update_spectrum(weight, weight.T)
