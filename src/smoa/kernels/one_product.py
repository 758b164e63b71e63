r"""Forms `W + ΔW`, the one place where ΔW meets W, and multiplies with it: `x(W + ΔW)ᵀ + b` in one product.

    W + ΔW = W ⊙ (1 + U),   U = B̃Ã with the scale in B̃: zero off the diagonal blocks   (arXiv:2605.21147)

A training step takes 2 + 1/K products. W + ΔW is formed piece by piece and never kept: by rows for the output and for a
merge, by columns for the gradient of x, so that no sum is rounded between pieces. All have the same bits, because one
cut, of the shape alone, serves all: a product of the factors gives an entry the same bits in every piece of at least 16
rows. So what is trained is what a merge writes.

In 16 bits the factors are rounded to W's dtype (three times as fast, and nothing measurable is lost), and `W(1 + U)` is
computed in float32 and rounded once. This keeps more of a small ΔW than `x Wᵀ + x ΔWᵀ`, whose sum is rounded to 16 bits
too: 0.8 to 0.9 of an update of a thousandth of y, where that keeps 0.55 (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smoa.kernels.autograd import Gradients, is_transformed, recomputed, without_autocast
from smoa.kernels.blocks import SCRATCH, Branch, block_deltas, multiply, plain_branch, product_dtype
from smoa.kernels.factors import Factors
from smoa.kernels.shared import shared_by_one

ALL = slice(None)

PIECE = 1 << 22
"""Entries of W in a piece on a CPU (docs/decisions.md)."""
PIECE_ON_GPU = 1 << 26
"""Entries on a GPU, for its memory: all of a layer of 8192 × 8192, 128 MiB in 16 bits, and a part of a larger one."""
MIN_TOKENS = 4
"""Tokens for each of K² from which W + ΔW pays, twice as many where the blocks are contiguous
(docs/decisions.md)."""
MIN_TOKENS_ON_GPU = 4096
"""Fewest tokens from which it pays on a GPU, by arithmetic: it was never run on one (docs/what-works.md)."""
LARGEST_KEPT = 1 << 26
"""Entries of the largest W + ΔW whose memory a thread keeps for the next layer: to page 32 MiB in anew takes a tenth of
a step of 4096 × 4096."""
MASK_COST = 64
"""Cost of masking one entry, in multiplications of a matrix product (docs/decisions.md)."""
FEWEST_ROWS, FEWEST_COLUMNS = 16, 64
"""Pieces have at least so many: products of fewer rows sum in another order, of fewer columns take twice the time."""
FEW_ENTRIES = 1 << 14
"""Of diagonal blocks of ΔW that are formed for few tokens too: in a small layer that takes fewer operations."""
SUMMED_OTHERWISE = 4096
"""PyTorch sums products of so few multiplications in 16 bits in another order."""


def pays(num_blocks: int, tokens: int, are_contiguous: Callable[[], bool], device_type: str = "cpu") -> bool:
    """Whether to form W + ΔW, which takes passes over the weight, for so many tokens."""
    fewest = MIN_TOKENS * num_blocks**2
    if tokens < fewest or (device_type != "cpu" and tokens < MIN_TOKENS_ON_GPU):
        return False
    return tokens >= 2 * fewest or not are_contiguous()


def sums_by_shape() -> bool:
    """Whether this CPU sums a product of 16 bits in an order that depends on its shape: with a piece of W it then has
    other bits than with all of W, as is so with AMX (which also takes up to twice the time for pieces)."""
    return bool(torch.cpu._is_amx_tile_supported())


def cut(size: int, other: int, fewest: int, entries: int) -> Iterator[slice]:
    """Pieces of `size` rows or columns of `other` entries each: multiples of 16, none shorter, of about so many entries
    in all, or of `fewest` rows or columns."""
    step, first = max(fewest, entries // max(other, 1) // 16 * 16), 0
    while size - first >= step + FEWEST_ROWS:
        yield slice(first, first + step)
        first += step
    yield slice(first, size)


class Effective:
    """`W + Σ ΔW` of one matrix, rounded once, by pieces; each is overwritten when the next is formed.

    Entries off the diagonal blocks are W's if the factors are finite; a merge writes the blocks alone.

    Args:
        weight: Pristine W (out_features, in_features).
        updates: Those to add. More than one, or one without modulation, are formed as ΔW first, in float32 or wider.
        transposed: Whether W is stored as (in_features, out_features), as in a Conv1D.
        numbers: Only these rows, int (rows,), of one update.
    """

    def __init__(
        self, weight: Tensor, *updates: Factors, transposed: bool = False, numbers: Tensor | None = None
    ) -> None:
        self.weight, self.transposed = weight, transposed
        self.entries = PIECE if weight.device.type == "cpu" else PIECE_ON_GPU
        factors, *others = updates
        self.deltas = [delta_of(own, weight) for own in updates] if others or factors.modulation == "none" else []
        if self.deltas:
            return
        self.labels = factors.blocks.row_labels, factors.blocks.col_labels
        # The product of the spread factors is zero off the diagonal blocks, at r multiplications for each entry. For
        # large r it is cheaper to stack the blocks' ranks, at max r_k for each, and to mask the result.
        self.masks = sum(factors.ranks) - max(factors.ranks) > MASK_COST
        own = product_dtype(weight.dtype, weight.device.type)
        dtype = own if weight.dtype.itemsize == 2 else torch.promote_types(own, factors.A.dtype)
        self.entries //= 1 if dtype == weight.dtype else 2
        if numbers is None:
            self.A, self.B = factors.spread(dtype, self.masks)
        else:
            self.weight, self.labels = F.embedding(numbers, weight), (self.labels[0][numbers], self.labels[1])
            self.A, self.B = factors.spread_rows(dtype, numbers, self.masks)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Pieces (rows, in_features)."""
        m, n = self.weight.shape
        for rows in cut(m, n, FEWEST_ROWS, self.entries):
            yield rows, self._piece(rows, ALL)

    def operands(self, dtype: torch.dtype, columns: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """What products in `dtype` take one after the other: pieces of rows or of columns, or the whole."""
        if dtype.itemsize == 2 and self.weight.device.type == "cpu" and sums_by_shape():
            (m, n), like = self.weight.shape, self.weight.new_empty(0, dtype=dtype)
            made = SCRATCH.take("whole", (n, m) if self.transposed else (m, n), like, LARGEST_KEPT)
            yield ALL, self.whole(made.T if self.transposed else made)  # laid out as a merged one
        else:
            for places, piece in self.columns() if columns else self.rows():
                yield places, piece.to(dtype)

    def whole(self, made: Tensor | None = None) -> Tensor:
        """All of it, (out_features, in_features), in `made` and its dtype if that is given."""
        made = torch.empty_like(self.weight) if made is None else made
        for rows, piece in self.rows():
            made[rows] = piece
        return made

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Pieces (out_features, columns)."""
        m, n = self.weight.shape
        for columns in cut(n, m, FEWEST_COLUMNS, self.entries):
            yield columns, self._piece(ALL, columns)

    def _piece(self, rows: slice, columns: slice) -> Tensor:
        weight = self.weight[rows, columns]
        if self.deltas:
            return (sum(delta(rows, columns) for delta in self.deltas) + weight).to(weight.dtype)
        A, B = self.A[:, columns], self.B[rows]
        update = _product(A.T, B.T).T if self.transposed else _product(B, A)
        if self.masks:
            of_rows, of_columns = self.labels
            update.masked_fill_(of_rows[rows, None] != of_columns[columns], 0)
        wide = weight.to(update.dtype)
        return torch.addcmul(wide, wide, update, out=update).to(weight.dtype)


def delta_of(factors: Factors, weight: Tensor) -> Callable[..., Tensor]:
    """Forms ΔW of some rows and columns, all by default, in the widest of float32 and the dtypes of the weight and the
    factors."""
    A, B = factors.spread(torch.promote_types(factors.dtype, weight.dtype))

    def delta(rows: slice = ALL, columns: slice = ALL) -> Tensor:
        with without_autocast(weight.device.type):
            product = B[rows] @ A[:, columns]
        if factors.modulation == "none":
            return product
        own = weight[rows, columns]
        return product * own if is_transformed(own) else product.mul_(own)

    return delta


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, of so many rows that each has the same bits in every piece."""
    (count, r), columns = left.shape, right.shape[1]
    rows = max(count, FEWEST_ROWS, SUMMED_OTHERWISE // (r * columns) + 1)
    left = left if rows == count else F.pad(left, (0, 0, 0, rows - count))
    return torch.mm(left, right, out=SCRATCH.take("update", (rows, columns), left))[:count]


@dataclass(frozen=True)
class OneProduct:
    """`x(W + ΔW)ᵀ + b` for x (tokens, in_features), in the dtype of x, to which W + ΔW is rounded.

    Args:
        transposed: As in `Effective`.
    """

    transposed: bool = False

    def forward(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = product_dtype(x.dtype, x.device.type)
        y, own = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), x.to(dtype)
        for rows, effective in self._effective(factors, weight).operands(x.dtype):
            effective = effective.to(dtype)
            if bias is None:
                torch.mm(own, effective.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows].to(dtype), own, effective.T, out=y[:, rows])
        return y.to(x.dtype)

    def plain(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, plain_effective(factors, weight).to(x.dtype), bias)

    def backward(self, factors: Factors, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        grad_A, grad_B = Branch().backward(factors, g, x, weight, False)[1:] if factors.trains else (None, None)
        if not needs_x:
            return None, grad_A, grad_B
        dtype = product_dtype(x.dtype, x.device.type)
        grad_x, own = torch.empty_like(x, dtype=dtype), g.to(dtype)
        for columns, effective in self._effective(factors, weight).operands(x.dtype, columns=True):
            torch.mm(own, effective.to(dtype), out=grad_x[:, columns])
        return grad_x.to(x.dtype), grad_A, grad_B

    def _effective(self, factors: Factors, weight: Tensor) -> Effective:
        return Effective(weight, factors, transposed=self.transposed)


def plain_effective(factors: Factors, weight: Tensor) -> Tensor:
    """W + ΔW in the dtype of W by PyTorch's own operations, differentiable in the factors and W."""
    if factors.modulation == "none":
        return (weight + delta_of(factors, weight)()).to(weight.dtype)
    dtype = weight.dtype if weight.dtype.itemsize == 2 else torch.promote_types(weight.dtype, factors.A.dtype)
    A, B = factors.spread(dtype)
    wide = weight.to(dtype)
    return torch.addcmul(wide, wide, B @ A).to(weight.dtype)


Weight = Tensor | Callable[[], Tensor]


@dataclass(eq=False)
class Update(Factors):
    """ΔW = s·(BA) ⊙ M of one layer, from its factors, scale and blocks."""

    def delta(self, weight: Tensor) -> Tensor:
        """Dense ΔW, in the widest of float32 and the dtypes of the pristine `weight` W (out_features, in_features) and
        the factors."""
        return delta_of(self, weight)()

    def apply(self, x: Tensor, weight: Weight) -> Tensor:
        """`x ΔWᵀ` for x (…, in_features) in the dtype of x; differentiable in x, A and B.

        Args:
            x: (…, in_features).
            weight: Pristine W (out_features, in_features), or a function that dequantizes it, for the backward again.
        """
        if self.modulation == "none":
            return plain_branch(self, x, None)
        y = recomputed(Branch(), self, x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], self.blocks.out_features)

    def apply_to_few(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x ΔWᵀ` as `apply` gives it, for few tokens in fewer operations; not differentiable. There is M."""
        with without_autocast(x.device.type):  # it would round the factors
            if weight.numel() <= FEW_ENTRIES * len(self.ranks):
                return multiply(x, self.blocks, block_deltas(self, weight, x.dtype))
            y = shared_by_one(self, x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], self.blocks.out_features)

    def apply_with_base(self, x: Tensor, weight: Weight, bias: Tensor | None, transposed: bool = False) -> Tensor:
        """`x(W + ΔW)ᵀ + b` in one product, for M = W; differentiable in x, A, B and bias.

        W + ΔW has the very bits that a merge writes, and is rounded to the dtype of x for the product.

        Args:
            x: (…, in_features).
            weight: As in `apply`, in the dtype of x, or in float32 under autocast.
            bias: (out_features,) in the dtype of x.
            transposed: Whether W is stored as (in_features, out_features).
        """
        y = recomputed(OneProduct(transposed), self, x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])
