"""Aligned blocks: the block of each coordinate, and the K diagonal blocks of a matrix.

| symbol | meaning                       | in code                   |
|--------|-------------------------------|---------------------------|
| m, n   | size of W, (m, n)             | out_features, in_features |
| K      | number of blocks              | num_blocks                |
| I_k    | output coordinates of block k | Blocks.rows(k)            |
| J_k    | input coordinates of block k  | Blocks.cols(k)            |

Within a block, coordinates keep their natural order. Block sizes are those of `torch.tensor_split`. Labels that ascend
make every block a run of neighbors: then the diagonal blocks are slices, and nothing is gathered or scattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from smoa.errors import PartitionError

UNDECIDED = 255
"""Label of a coordinate whose block is not decided yet. Labels are one byte, which leaves at most 255 blocks."""
MAX_BLOCKS = UNDECIDED


def block_sizes(size: int, num_blocks: int) -> tuple[int, ...]:
    """Sizes of K runs of `size` coordinates, as in `torch.tensor_split`: the first `size % K` are larger by one."""
    quotient, remainder = divmod(size, num_blocks)
    return (quotient + 1,) * remainder + (quotient,) * (num_blocks - remainder)


def slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Consecutive slices of the given sizes."""
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True))


class Orders(NamedTuple):
    """Coordinates sorted by block, and the inverse permutations: int64, (out_features,) and (in_features,)."""

    rows: Tensor
    rows_inverse: Tensor
    cols: Tensor
    cols_inverse: Tensor

    @classmethod
    def of(cls, row_labels: Tensor, col_labels: Tensor) -> Orders:
        """Sort both sides, stable. Called when labels change, never in a training step."""
        rows, cols = (torch.argsort(labels, stable=True) for labels in (row_labels, col_labels))
        return cls(rows, torch.argsort(rows), cols, torch.argsort(cols))


def ascend(*labels: Tensor) -> bool:
    """Whether all these labels are in natural order; False on the meta device. Waits for the labels' device."""
    return all(side.device.type != "meta" and bool((side[1:] >= side[:-1]).all()) for side in labels)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The aligned blocks of a weight (out_features, in_features).

    Args:
        row_labels: uint8 (out_features,), the block of each output coordinate.
        col_labels: uint8 (in_features,), the block of each input coordinate.
        num_blocks: K, between 1 and 255.
        orders: The sorted coordinates, by default computed from the labels. If given, the labels are not checked again.
        is_contiguous: Whether the labels of both sides ascend. Computed with `orders`.
        shape: (out_features, in_features), by default the labels'. In `torch.jit.trace` those are not plain numbers.

    Raises:
        PartitionError: K is out of range, the labels have another dtype or shape, or the block sizes are not those of
            `torch.tensor_split`.
    """

    row_labels: Tensor
    col_labels: Tensor
    num_blocks: int
    orders: Orders = None  # type: ignore[assignment]  # `__post_init__` sets it
    is_contiguous: bool = False
    shape: tuple[int, int] = None  # type: ignore[assignment]  # `__post_init__` sets it

    def __post_init__(self) -> None:
        if self.shape is None:
            object.__setattr__(self, "shape", (self.row_labels.shape[0], self.col_labels.shape[0]))
        if self.orders is None:
            check_num_blocks(self.num_blocks, len(self.row_labels), len(self.col_labels))
            check_labels(self.row_labels, self.num_blocks, "row_labels")
            check_labels(self.col_labels, self.num_blocks, "col_labels")
            object.__setattr__(self, "orders", Orders.of(self.row_labels, self.col_labels))
            object.__setattr__(self, "is_contiguous", ascend(self.row_labels, self.col_labels))

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def row_slices(self) -> tuple[slice, ...]:
        """Where each block's output coordinates are in `orders.rows`."""
        return slices(block_sizes(self.out_features, self.num_blocks))

    @property
    def col_slices(self) -> tuple[slice, ...]:
        """Where each block's input coordinates are in `orders.cols`."""
        return slices(block_sizes(self.in_features, self.num_blocks))

    def rows(self, block: int) -> Tensor:
        """Output coordinates of `block`, ascending, int64."""
        return self.orders.rows[self.row_slices[block]]

    def cols(self, block: int) -> Tensor:
        """Input coordinates of `block`, ascending, int64."""
        return self.orders.cols[self.col_slices[block]]

    def each_of(self, matrix: Tensor) -> Iterator[Tensor]:
        """Copies of the K diagonal blocks `matrix[I_k, J_k]`, one after the other, differentiable."""
        for rows, cols in zip(self.row_slices, self.col_slices, strict=True):
            if self.is_contiguous:
                yield matrix[rows, cols].clone(memory_format=torch.contiguous_format)
            else:
                yield reordered(matrix[self.orders.rows[rows]], self.orders.cols[cols])

    def of(self, matrix: Tensor) -> list[Tensor]:
        """Copies of the K diagonal blocks `matrix[I_k, J_k]`, differentiable."""
        return list(self.each_of(matrix))

    def write(self, matrix: Tensor, blocks: Sequence[Tensor]) -> None:
        """Overwrite the diagonal blocks of `matrix` in place, in its dtype and on its device."""
        for k, entries in enumerate(blocks):
            if self.is_contiguous:
                matrix[self.row_slices[k], self.col_slices[k]] = entries.to(matrix)
                continue
            rows, cols = self.rows(k).to(matrix.device), self.cols(k).to(matrix.device)
            matrix[rows[:, None], cols] = entries.to(matrix)

    def sort_inputs(self, x: Tensor) -> Tensor:
        """`x[..., orders.cols]`, differentiable; x itself if the blocks are contiguous."""
        return x if self.is_contiguous else reordered(x, self.orders.cols)

    def unsort_outputs(self, y: Tensor) -> Tensor:
        """`y[..., orders.rows_inverse]`, differentiable; y itself if the blocks are contiguous."""
        return y if self.is_contiguous else reordered(y, self.orders.rows_inverse)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """`x[..., order]`, differentiable. On a CPU `index_select` takes up to ten times as long for three dimensions."""
    if x.device.type != "cpu":
        return x.index_select(-1, order)
    return x.gather(-1, order.expand(*x.shape[:-1], -1))


def take_columns(x: Tensor, order: Tensor, out: Tensor) -> Tensor:
    """`x[:, order]` in `out`; two-byte entries on a CPU are copied by NumPy, which takes a third of the time."""
    if x.device.type != "cpu":
        return torch.index_select(x, 1, order, out=out)
    if x.dtype.itemsize != 2:
        return torch.gather(x, 1, order.expand(len(x), len(order)), out=out)
    entries, target = (tensor.detach().view(torch.int16).numpy() for tensor in (x, out))
    numpy.take(entries, order.numpy(), axis=1, out=target, mode="clip")  # the other modes buffer the output
    return out


def check_num_blocks(num_blocks: int, out_features: int, in_features: int) -> None:
    """Raise PartitionError unless 1 ≤ K ≤ min(out_features, in_features, 255)."""
    limit = min(out_features, in_features, MAX_BLOCKS)
    if not 1 <= num_blocks <= limit:
        raise PartitionError(
            f"num_blocks={num_blocks} must be between 1 and {limit} for a weight of shape "
            f"({out_features}, {in_features}); lower num_blocks, or its num_blocks_pattern, or exclude this module"
        )


def as_labels(labels: Tensor, most: float = 0.01) -> Tensor:
    """Labels that were made float as uint8, if they are whole numbers, but for at most so much; others as they are."""
    if not labels.is_floating_point() or labels.itemsize == 1:
        return labels
    found = labels.round().to(torch.uint8)
    return found if bool(((found - labels.double()).abs() <= most).all()) else labels


def check_labels(labels: Tensor, num_blocks: int, name: str) -> None:
    """Raise PartitionError unless `labels` is a uint8 vector whose block sizes are those of `torch.tensor_split`."""
    if labels.dtype != torch.uint8 or labels.ndim != 1:
        raise PartitionError(f"{name} must be a uint8 vector, got {labels.dtype} of shape {tuple(labels.shape)}")
    counts = torch.bincount(labels.cpu(), minlength=num_blocks).tolist()
    expected = list(block_sizes(len(labels), num_blocks))
    if counts != expected:
        raise PartitionError(
            f"{name} must hold {num_blocks} blocks of sizes {_short(expected)}, found label counts {_short(counts)}"
        )


def _short(sizes: list[int]) -> str:
    return str(sizes) if len(sizes) <= 8 else f"[{', '.join(map(str, sizes[:8]))}, … {len(sizes)} in all]"
