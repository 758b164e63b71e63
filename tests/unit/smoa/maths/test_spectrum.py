from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoa.errors import PartitionError
from smoa.maths.spectrum import PartitionKind, labels_from_scores, make_partition, spectral_scores
from tests import reference
from tests.support.decompositions import NoDecomposition
from tests.support.threads import threads
from tests.support.tolerance import TOLERANCE, assert_close

SHAPES = [(24, 24), (40, 16), (16, 40), (7, 5), (1, 6), (6, 1)]


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same_scores(weight: Tensor) -> None:
    for actual, expected in zip(spectral_scores(weight), reference.scores(weight), strict=True):
        assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_those_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    assert_same_scores(doubles(*shape))


def test_scores_of_a_weight_of_low_rank_equal_those_of_a_full_decomposition() -> None:
    assert_same_scores(doubles(30, 4) @ doubles(4, 20))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_coordinate_without_energy_scores_zero(shape: tuple[int, int]) -> None:
    weight = doubles(*shape)
    weight[[3, 7, 8]] = 0
    weight[:, [0, 5]] = 0
    row_scores, col_scores = spectral_scores(weight)
    assert (row_scores[[3, 7, 8]] == 0).all()
    assert (col_scores[[0, 5]] == 0).all()
    assert_same_scores(weight)


def test_scores_of_a_diagonal_weight_count_its_entries_by_size() -> None:
    row_scores, col_scores = spectral_scores(torch.diag(torch.tensor([2.0, 5.0, 3.0, 4.0], dtype=torch.float64)))
    expected = torch.tensor([3.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    assert_close(row_scores, expected)
    assert_close(col_scores, expected)


def test_equal_rows_have_equal_scores() -> None:
    weight = doubles(20, 12)
    weight[11] = weight[2]
    row_scores, _ = spectral_scores(weight)
    assert_close(row_scores[11], row_scores[2])


def test_scores_of_the_transpose_are_swapped() -> None:
    weight = doubles(23, 14)
    row_scores, col_scores = spectral_scores(weight)
    first, second = spectral_scores(weight.T.contiguous())
    assert_close(first, col_scores)
    assert_close(second, row_scores)


def test_permuted_rows_have_permuted_scores() -> None:
    weight, order = doubles(23, 14), torch.randperm(23)
    assert_close(spectral_scores(weight[order])[0], spectral_scores(weight)[0][order])


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_the_scale_of_a_weight_does_not_matter(factor: float) -> None:
    weight = torch.randn(30, 20)
    for scaled, plain in zip(spectral_scores(weight * factor), spectral_scores(weight), strict=True):
        assert_close(scaled, plain)


def test_scores_are_computed_in_float64_only_for_a_float64_weight() -> None:
    dtypes = {dtype: spectral_scores(torch.randn(6, 5).to(dtype))[0].dtype for dtype in (torch.bfloat16, torch.float64)}
    assert dtypes == {torch.bfloat16: torch.float32, torch.float64: torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 24).to(dtype)
    half, single = make_partition(weight, 4), make_partition(weight.float(), 4)
    assert torch.equal(half.row_labels, single.row_labels)
    assert torch.equal(half.col_labels, single.col_labels)


def test_float32_scores_are_close_to_those_of_a_full_decomposition_in_float64() -> None:
    weight = torch.randn(64, 48)
    for actual, expected in zip(spectral_scores(weight), reference.scores(weight), strict=True):
        assert_close(actual, torch.tensor(expected))


@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=40), num_blocks=st.integers(1, 5))
def test_labels_are_cut_from_a_stable_order(scores: list[float], num_blocks: int) -> None:
    assert labels_from_scores(torch.tensor(scores), num_blocks).tolist() == reference.labels(scores, num_blocks)


def test_labels_are_bytes() -> None:
    assert labels_from_scores(torch.rand(9), 4).dtype == torch.uint8


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (7, 9)])
def test_the_spectral_partition_is_that_of_a_full_decomposition(shape: tuple[int, int], num_blocks: int) -> None:
    weight = doubles(*shape)
    partition = make_partition(weight, num_blocks)
    expected_rows, expected_cols = reference.spectral_labels(weight, num_blocks)
    assert partition.row_labels.tolist() == expected_rows
    assert partition.col_labels.tolist() == expected_cols


def test_rows_without_energy_keep_their_natural_order_in_the_first_blocks() -> None:
    weight = doubles(12, 9)
    weight[[1, 4, 6, 10]] = 0
    partition = make_partition(weight, 6)
    assert partition.rows(0).tolist() == [1, 4]
    assert partition.rows(1).tolist() == [6, 10]


def test_the_spectral_partition_of_a_zero_weight_is_contiguous() -> None:
    partition = make_partition(torch.zeros(10, 7), 3)
    assert partition.row_labels.tolist() == reference.contiguous_labels(10, 3)
    assert partition.col_labels.tolist() == reference.contiguous_labels(7, 3)


def test_the_contiguous_partition_cuts_the_natural_order() -> None:
    partition = make_partition(torch.randn(11, 8), 4, "contiguous")
    assert partition.row_labels.tolist() == reference.contiguous_labels(11, 4)
    assert partition.col_labels.tolist() == reference.contiguous_labels(8, 4)


def test_the_random_partition_follows_the_seed() -> None:
    weight = torch.randn(40, 30)
    first, second = make_partition(weight, 4, "random"), make_partition(weight, 4, "random")
    torch.manual_seed(0)
    torch.randn(40, 30)
    again = make_partition(weight, 4, "random")
    assert not torch.equal(first.row_labels, second.row_labels)
    assert torch.equal(first.row_labels, again.row_labels)
    assert torch.equal(first.col_labels, again.col_labels)


@pytest.mark.parametrize("kind", ["contiguous", "random"])
def test_only_the_spectral_partition_decomposes(kind: str) -> None:
    weight = torch.randn(12, 10)
    with NoDecomposition():
        make_partition(weight, 3, kind)
        with pytest.raises(AssertionError, match="no decomposition is allowed"):
            make_partition(weight, 3, "spectral")


@pytest.mark.parametrize("kind", ["spectral", "contiguous", "random"])
def test_blocks_cover_every_coordinate_once_in_ascending_order(kind: str) -> None:
    partition = make_partition(torch.randn(23, 17), 5, kind)
    rows, cols = [partition.rows(k) for k in range(5)], [partition.cols(k) for k in range(5)]
    assert all(torch.equal(block, block.sort().values) for block in rows + cols)
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(23))
    assert torch.equal(torch.cat(cols).sort().values, torch.arange(17))
    assert [len(block) for block in rows] == reference.block_sizes(23, 5)
    assert [len(block) for block in cols] == reference.block_sizes(17, 5)


@pytest.mark.parametrize("num_blocks", [-1, 0, 6, 300])
def test_a_number_of_blocks_that_does_not_fit_the_weight_is_refused(num_blocks: int) -> None:
    with pytest.raises(PartitionError, match=rf"num_blocks={num_blocks}\b.*\b5\b"):
        make_partition(torch.randn(5, 8), num_blocks)


def test_more_blocks_than_a_byte_can_count_are_refused() -> None:
    with pytest.raises(PartitionError, match="num_blocks=256"):
        make_partition(torch.randn(300, 300), 256)


def test_255_blocks_are_possible() -> None:
    partition = make_partition(torch.randn(300, 260), 255)
    assert partition.row_labels.max() == 254


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["spectral", "contiguous", "random"])
def test_a_weight_that_is_not_finite_is_refused(value: float, kind: PartitionKind) -> None:
    weight = torch.randn(8, 8)
    weight[2, 3] = value
    with pytest.raises(PartitionError, match="finite"):
        make_partition(weight, 2, kind)


@pytest.mark.parametrize(("gap", "decompositions"), [(1e-7, 2), (0.0, 1), (0.5, 1)])
def test_a_cut_between_scores_that_float32_cannot_tell_apart_is_decided_precisely(
    gap: float, decompositions: int
) -> None:
    asked = []

    def scores_of(weight: Tensor, precise: bool) -> tuple[Tensor, Tensor]:
        asked.append(precise)
        rows = torch.tensor([0.0, 0.25, 0.25 + gap, 0.9])
        return (rows.flip(0) if precise else rows), torch.arange(4.0)

    partition = make_partition(torch.eye(4), 2, scores_of=scores_of)
    assert asked == [False, True][:decompositions]
    assert partition.row_labels.tolist() == ([1, 1, 0, 0] if decompositions == 2 else [0, 0, 1, 1])


def test_precise_scores_of_a_float32_weight_are_nearer_to_those_of_float64() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.linspace(0.01, 1, 200)
    exact = spectral_scores(weight.double())
    errors = [
        max((found.double() - true).abs().max().item() for found, true in zip(scores, exact, strict=True))
        for scores in (spectral_scores(weight), spectral_scores(weight, precise=True))
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-5, 1.0, 1e5, 1e30, 3e37])
def test_the_partition_does_not_depend_on_the_scale_of_a_float32_weight(scale: float) -> None:
    # a power of two, so that the entries are the same numbers
    factor = 2.0 ** torch.tensor(scale).log2().round().item()
    weight = torch.randn(12, 10) * 0.5
    expected, found = make_partition(weight, 3), make_partition(weight * factor, 3)
    assert torch.equal(found.row_labels, expected.row_labels)
    assert torch.equal(found.col_labels, expected.col_labels)


def test_scores_of_a_large_weight_are_the_same_within_the_tolerance_on_two_threads() -> None:
    weight = torch.randn(384, 256)
    with threads(2):
        found = spectral_scores(weight)
    with threads(1):
        expected = spectral_scores(weight)
    for ours, theirs in zip(found, expected, strict=True):
        # scores run up to 255, so that is what is relative
        assert ((ours - theirs).abs().max() / 255) < TOLERANCE[torch.float32].rtol
