import pytest
import torch

from smoa.maths.blocks import Blocks
from smoa_lab.inspect import update_spectrum


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


def test_an_update_of_zero_has_no_rank_and_no_coverage(weight: torch.Tensor) -> None:
    found = update_spectrum(weight, torch.zeros_like(weight))
    assert (found.rank, found.effective_rank, found.coverage) == (0, 0.0, 0.0)
    assert (found.relative_spectral_norm, found.stable_rank) == (0, 0)


def test_the_coverage_of_a_block_is_that_of_its_part_of_the_update(weight: torch.Tensor) -> None:
    rows, cols = (torch.tensor(labels, dtype=torch.uint8) for labels in ([0, 1, 2] * 4, [2, 0, 1, 0, 1, 2, 0]))
    blocks = Blocks(rows, cols, 3)
    delta = torch.zeros_like(weight)
    for k in range(3):
        inside = torch.outer(blocks.row_labels == k, blocks.col_labels == k)
        delta[inside] = torch.randn(int(inside.sum()), dtype=weight.dtype)
    found = update_spectrum(weight, delta, blocks)
    for k, coverage in enumerate(found.block_coverages):
        alone = torch.where(torch.outer(blocks.row_labels == k, blocks.col_labels == k), delta, 0)
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        energy = (alone @ Vh.T).square().sum(0) + (U.T @ alone).square().sum(1)
        place = torch.arange(7, dtype=weight.dtype) / 7
        assert coverage == pytest.approx(float((energy * place).sum() / energy.sum()))
    assert update_spectrum(weight, delta).block_coverages == ()
