"""Blocks and factors: sizes, coordinates, scale, initialization."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoa.errors import PartitionError
from smoa.maths.blocks import Blocks, Orders, ascend, block_sizes, check_num_blocks
from smoa.maths.factors import init_factors, saved_shapes, split_rank
from tests import reference
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem

# (out_features, in_features, num_blocks): even, tall and ragged, wide and ragged, one block, as many as there are rows.
SIZES = [(12, 12, 3), (17, 10, 4), (9, 16, 5), (8, 5, 1), (6, 7, 6)]
sizes = pytest.mark.parametrize(("out_features", "in_features", "num_blocks"), SIZES)


def shuffled_labels(size: int, num_blocks: int) -> Tensor:
    return torch.tensor(reference.contiguous_labels(size, num_blocks), dtype=torch.uint8)[torch.randperm(size)]


def shuffled(out_features: int, in_features: int, num_blocks: int) -> Blocks:
    """Blocks of coordinates in random places."""
    return Blocks(shuffled_labels(out_features, num_blocks), shuffled_labels(in_features, num_blocks), num_blocks)


def places(labels: Tensor, block: int) -> list[int]:
    """Coordinates of a block, one after another."""
    return [i for i, label in enumerate(labels.tolist()) if label == block]


# sizes and labels


@given(size=st.integers(1, 300), num_blocks=st.integers(1, 255))
def test_block_sizes_are_those_of_tensor_split(size: int, num_blocks: int) -> None:
    expected = [len(part) for part in torch.tensor_split(torch.empty(size), num_blocks)]
    assert list(block_sizes(size, num_blocks)) == expected


@pytest.mark.parametrize(
    ("row_labels", "col_labels"),
    [
        pytest.param([0, 0, 0, 1], [0, 0, 1], id="blocks of other sizes"),
        pytest.param([0, 0, 1, 2], [0, 0, 1], id="a label that is not a block"),
        pytest.param([0, 0, 1, 1], [0, 1, 1], id="the longer block last"),
        pytest.param([0, 0, 1, 255], [0, 0, 1], id="an undecided label"),
    ],
)
def test_labels_that_are_no_partition_are_refused(row_labels: list[int], col_labels: list[int]) -> None:
    rows, cols = (torch.tensor(labels, dtype=torch.uint8) for labels in (row_labels, col_labels))
    with pytest.raises(PartitionError):
        Blocks(rows, cols, num_blocks=2)
    with pytest.raises(PartitionError, match="uint8"):
        Blocks(rows.long(), cols.long(), num_blocks=2)
    orders = Orders.of(rows, cols)  # with which they count as checked
    assert Blocks(rows, cols, 2, orders).orders is orders


@pytest.mark.parametrize("num_blocks", [0, 6])
def test_a_number_of_blocks_that_does_not_fit_is_refused_with_the_limit(num_blocks: int) -> None:
    with pytest.raises(PartitionError, match=rf"num_blocks={num_blocks} must be between 1 and 5 .*\(9, 5\)"):
        check_num_blocks(num_blocks, 9, 5)
    check_num_blocks(255, 300, 300)
    with pytest.raises(PartitionError, match="between 1 and 255"):  # a byte
        check_num_blocks(256, 300, 300)


# which coordinates


@sizes
def test_orders_sort_by_block_and_back(out_features: int, in_features: int, num_blocks: int) -> None:
    blocks = shuffled(out_features, in_features, num_blocks)
    assert (blocks.out_features, blocks.in_features) == (out_features, in_features)
    for k in range(num_blocks):
        assert blocks.rows(k).tolist() == places(blocks.row_labels, k)
        assert blocks.cols(k).tolist() == places(blocks.col_labels, k)
    rows, rows_inverse, cols, cols_inverse = (order.tolist() for order in blocks.orders)
    assert rows == [i for k in range(num_blocks) for i in places(blocks.row_labels, k)]
    assert cols == [j for k in range(num_blocks) for j in places(blocks.col_labels, k)]
    assert [rows[place] for place in rows_inverse] == list(range(out_features))
    assert [cols[place] for place in cols_inverse] == list(range(in_features))


def test_blocks_are_contiguous_where_the_labels_of_both_sides_ascend() -> None:
    ascending = torch.tensor(reference.contiguous_labels(9, 4), dtype=torch.uint8)
    other = torch.tensor(reference.contiguous_labels(6, 4), dtype=torch.uint8)
    assert Blocks(ascending, other, 4).is_contiguous
    assert not Blocks(ascending.roll(1), other, 4).is_contiguous
    assert not Blocks(ascending, other.roll(1), 4).is_contiguous
    assert shuffled(9, 7, 1).is_contiguous
    assert not ascend(ascending.to("meta"))
    x, blocks = torch.randn(2, 3, 9), Blocks(ascending, ascending, 4)
    assert blocks.sort_inputs(x) is x
    assert blocks.unsort_outputs(x) is x
    blocks = shuffled(9, 9, 4)
    assert torch.equal(blocks.sort_inputs(x), x[..., blocks.orders.cols])
    assert torch.equal(blocks.unsort_outputs(x)[..., blocks.orders.rows], x)


# a matrix's blocks


@sizes
def test_the_blocks_of_a_matrix_are_its_entries_at_their_coordinates(
    out_features: int, in_features: int, num_blocks: int
) -> None:
    blocks, matrix = shuffled(out_features, in_features, num_blocks), torch.randn(out_features, in_features)
    entries = matrix.tolist()
    for k, block in enumerate(blocks.of(matrix)):
        rows, cols = places(blocks.row_labels, k), places(blocks.col_labels, k)
        assert block.tolist() == [[entries[i][j] for j in cols] for i in rows]


@sizes
def test_what_is_written_stands_in_the_diagonal_blocks_and_nowhere_else(
    out_features: int, in_features: int, num_blocks: int
) -> None:
    blocks = shuffled(out_features, in_features, num_blocks)
    matrix, source = torch.randn(out_features, in_features), torch.randn(out_features, in_features)
    before = matrix.tolist()
    blocks.write(matrix, blocks.of(source))
    for i, j in product(range(out_features), range(in_features)):
        same_block = blocks.row_labels[i] == blocks.col_labels[j]
        assert matrix[i, j].item() == (source[i, j].item() if same_block else before[i][j])


# factors


cases = pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)


# sizes


@given(r=st.integers(1, 300), num_blocks=st.integers(1, 255))
def test_a_rank_is_split_evenly_with_the_remainder_to_the_first_blocks(r: int, num_blocks: int) -> None:
    assert list(split_rank(r, num_blocks)) == reference.block_ranks(r, num_blocks)


# scale and dtype


# spreading


@cases
def test_the_product_of_spread_factors_is_the_unmodulated_update(
    out_features: int, in_features: int, ranks: tuple[int, ...]
) -> None:
    case = problem(out_features, in_features, ranks)
    scale = [1.0 + k for k in range(len(ranks))]
    spread_A, spread_B = case.factors(0.5, scale).spread(torch.float64)
    expected = reference.factor_shapes(out_features, in_features, len(ranks), sum(ranks))
    assert saved_shapes((out_features, in_features), ranks)[:2] == expected
    assert_close(spread_B @ spread_A, case.oracle("none", [0.5 * s for s in scale]))


# initialization


def initialized(init: Any, sizes: tuple[int, int], ranks: tuple[int, ...], relative_size: float = 0.1) -> list[Tensor]:
    A, B = (torch.full(shape, float("nan"), dtype=torch.float64) for shape in saved_shapes(sizes, ranks)[:2])
    init_factors(A, B, sizes, ranks, init, relative_size)
    return [A, B]


def blocks_of(A: Tensor, B: Tensor, sizes: tuple[int, int], ranks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """A_k and B_k without padding."""
    heights, widths = (reference.block_sizes(size, len(ranks)) for size in sizes)
    starts = [sum(ranks[:k]) for k in range(len(ranks) + 1)]
    runs = [slice(start, stop) for start, stop in pairwise(starts)]
    return [(A[run, :width], B[:height, run]) for height, width, run in zip(heights, widths, runs, strict=True)]


@pytest.mark.parametrize("init", [True, False, "zero_A"])
def test_padding_starts_at_zero(init: Any) -> None:
    A, B = initialized(init, (11, 13), (2, 0, 3))
    in_A, in_B = reference.real_entries(11, 13, (2, 0, 3))
    assert (A[~in_A] == 0).all()
    assert (B[~in_B] == 0).all()
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()


def assert_uniform(entries: Tensor, limit: float) -> None:
    assert entries.abs().max() <= limit
    assert entries.abs().max() > 0.99 * limit
    assert abs(entries.mean()) < 0.03 * limit
    assert abs(entries.std() / limit - 3**-0.5) < 0.03


def test_by_default_A_is_uniform_by_the_width_of_its_block_and_B_zero() -> None:
    sizes, ranks = (30, 401), (40, 10, 30)
    A, B = initialized(True, sizes, ranks)
    assert (B == 0).all()
    for (block_A, _), width in zip(blocks_of(A, B, sizes, ranks), reference.block_sizes(401, 3), strict=True):
        assert_uniform(block_A, width**-0.5)


def test_with_zero_A_it_is_B_that_is_uniform_by_its_blocks_rank() -> None:
    sizes, ranks = (401, 30), (40, 10, 30)
    A, B = initialized("zero_A", sizes, ranks)
    assert (A == 0).all()
    for (_, block_B), rank in zip(blocks_of(A, B, sizes, ranks), ranks, strict=True):
        assert_uniform(block_B, rank**-0.5)


def test_random_factors_give_a_product_of_the_size_asked_for_in_every_block() -> None:
    relative_size = 2.0
    sizes, ranks = (301, 200), (64, 16, 32)
    A, B = initialized(False, sizes, ranks, relative_size)
    for block_A, block_B in blocks_of(A, B, sizes, ranks):
        assert float((block_B @ block_A).square().mean().sqrt()) == pytest.approx(relative_size, rel=0.15)
