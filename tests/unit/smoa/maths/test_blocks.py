from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoa.errors import PartitionError
from smoa.maths.blocks import Blocks, Orders, ascend, block_sizes, check_num_blocks, take_columns
from tests import reference

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


@sizes
def test_the_blocks_of_contiguous_labels_are_slices(out_features: int, in_features: int, num_blocks: int) -> None:
    rows, cols = (
        torch.tensor(reference.contiguous_labels(n, num_blocks), dtype=torch.uint8) for n in (out_features, in_features)
    )
    blocks, matrix = Blocks(rows, cols, num_blocks), torch.randn(out_features, in_features)
    for k, (block, row, col) in enumerate(zip(blocks.of(matrix), blocks.row_slices, blocks.col_slices, strict=True)):
        assert torch.equal(block, matrix[blocks.rows(k)][:, blocks.cols(k)])
        assert block.is_contiguous()
        assert block.data_ptr() != matrix[row, col].data_ptr()
        assert blocks.part(matrix, row, col).data_ptr() == matrix[row, col].data_ptr()
    before = matrix.clone()
    blocks.write(matrix, [block.double() + 1 for block in blocks.of(matrix)])
    same_block = rows[:, None] == cols
    assert torch.equal(matrix, torch.where(same_block, (before.double() + 1).float(), before))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_of_a_block_are_picked_into_buffers(dtype: torch.dtype) -> None:
    blocks, matrix = shuffled(17, 10, 4), torch.randn(17, 10).to(dtype)
    rows, cols = slice(1, 4), blocks.col_slices[2]
    expected = matrix[blocks.orders.rows[rows]][:, blocks.orders.cols[cols]]
    whole_rows, out = torch.empty(3, 10, dtype=dtype), torch.empty(3, cols.stop - cols.start, dtype=dtype)
    assert torch.equal(blocks.part(matrix, rows, cols), expected)
    assert blocks.part(matrix, rows, cols, whole_rows, out) is out
    assert torch.equal(out, expected)
    assert torch.equal(whole_rows, matrix[blocks.orders.rows[rows]])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_taken_in_any_order_and_dtype(dtype: torch.dtype) -> None:
    x, order = torch.randn(5, 9).to(dtype), torch.randperm(9)[:6]
    x[0, 0], x[1, 1] = float("nan"), float("-inf")
    expected = x[:, order]
    out = torch.empty(5, 6, dtype=dtype)
    for found in (take_columns(x, order), take_columns(x, order, out), out):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@sizes
def test_the_blocks_of_the_transposed_weight_are_the_transposed_blocks(
    out_features: int, in_features: int, num_blocks: int
) -> None:
    blocks, matrix = shuffled(out_features, in_features, num_blocks), torch.randn(out_features, in_features)
    for own, other in zip(blocks.transposed().of(matrix.T), blocks.of(matrix), strict=True):
        assert torch.equal(own, other.T)
