r"""The updates of a stack of matrices of one shape, such as the experts of a mixture, each with rows of its own:

    ΔW_g[I_gk, J_gk] = s_gk·(B_gk A_gk) ⊙ W_g[I_gk, J_gk],   g = 0 … G−1   (arXiv:2605.21147)

Every matrix has a partition of its own: `Stack.update(g)` is its `Update`. The matrices share K, the ranks and α/r. So
all blocks are padded to one shape, and one product multiplies the rows and blocks of all matrices, grouped by block and
matrix: the number of operations doesn't grow with G. The product is PyTorch's `grouped_mm`, for float32 and 16 bits on
a CPU and a GPU. For anything else each group takes a product of its own.

Nothing waits for the device, unless groups are apart. The blocks of ΔW are formed again for the backward, so that only
x and the factors are kept. A CPU forms those of a part of the matrices at a time, which bounds memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smoa.kernels.autograd import Gradients, is_transformed, recomputed
from smoa.kernels.blocks import product_dtype
from smoa.kernels.one_product import Update
from smoa.kernels.scale import ModulationKind, whole_scale
from smoa.partition import Blocks, Orders, block_sizes, slices

ALIGNED = 8
"""Blocks are padded to a multiple of it, because `grouped_mm` wants widths of 16 bytes."""
LARGE, PARTS = 1 << 20, 16
"""On a CPU, a stack whose blocks have more entries is computed in parts (docs/decisions.md)."""
MOST_GROUPS = 1023
"""What `grouped_mm` takes in a call with 16 bits on an H100 or newer."""
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
grouped_mm = getattr(F, "grouped_mm", None)  # since PyTorch 2.10


class Side(NamedTuple):
    """One side of H matrices of each of E experts: its coordinates sorted by block, each block padded to p places.

    Args:
        labels: uint8 (E, H, size), the block of each coordinate.
        order: int32 (E, H, K, p), the coordinate at each place; the padding of a block repeats its last one.
        places: int32 (E, H, size), the place of each coordinate, of K·p.
        is_sorted: Whether each coordinate is at its own place in all matrices, and nothing is padded.
    """

    labels: Tensor
    order: Tensor
    places: Tensor
    is_sorted: bool

    @classmethod
    def of(cls, labels: Tensor, num_blocks: int) -> Side:
        """Sort the coordinates of each matrix, stable."""
        sizes = block_sizes(labels.shape[-1], num_blocks)
        p = -(-sizes[0] // ALIGNED) * ALIGNED
        sources = [[min(own.start + i, own.stop - 1) for i in range(p)] for own in slices(sizes)]
        places = torch.tensor([k * p + i for k, size in enumerate(sizes) for i in range(size)], device=labels.device)
        order = torch.argsort(labels, stable=True)
        of_coordinates = places[order.argsort()].int()
        every = torch.arange(num_blocks * p, dtype=torch.int32, device=labels.device)
        is_sorted = len(every) == labels.shape[-1] and torch.equal(of_coordinates, every.expand_as(labels))
        return cls(labels, order[..., sources].int(), of_coordinates, is_sorted)


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of G = E·H matrices: H of each of E experts, the matrix h of expert e being number e·H + h.

    Args:
        A: (G·r, ⌈n/K⌉), r ranks of the first matrix, then r of the second.
        B: (⌈m/K⌉, G·r).
        ranks: r_k of every block, the same in each matrix.
        scaling: α/r.
        rank_scale: The part of the scale that comes from the weights, (G, r) float32.
        rows: The outputs of each matrix.
        cols: The inputs of each matrix.
        modulation: As in `Update`.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: float
    rank_scale: Tensor
    rows: Side
    cols: Side
    modulation: ModulationKind = "hadamard"

    def update(self, number: int) -> Update:
        """ΔW of one matrix."""
        own = slice(number * sum(self.ranks), (number + 1) * sum(self.ranks))
        A, B, of_ranks = self.A[own], self.B[:, own], self.rank_scale[number]
        rows, cols = (side.labels.flatten(0, 1)[number] for side in (self.rows, self.cols))
        blocks = Blocks(rows, cols, len(self.ranks), Orders.of(rows, cols))
        return Update(A, B, self.ranks, self.scaling, of_ranks, blocks, self.modulation)

    def with_factors(self, A: Tensor | None, B: Tensor | None) -> Stack:
        """The same with other factors."""
        return replace(self, A=A, B=B)  # type: ignore[arg-type]  # none between a forward and its backward

    def transposed(self) -> Stack:
        """The updates of the transposed matrices, which are ΔWᵀ."""
        return replace(self, A=self.B.T, B=self.A.T, rows=self.cols, cols=self.rows)

    def of_expert(self, number: int) -> Stack:
        """The updates of one expert's matrices."""
        halves, r, expert = self.rows.order.shape[1], sum(self.ranks), slice(number, number + 1)
        own, ranks = (slice(number * size, (number + 1) * size) for size in (halves, halves * r))
        rows, cols = (
            Side(side.labels[expert], side.order[expert], side.places[expert], side.is_sorted)
            for side in (self.rows, self.cols)
        )
        return replace(self, A=self.A[ranks], B=self.B[:, ranks], rank_scale=self.rank_scale[own], rows=rows, cols=cols)

    def apply(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """`x ΔWᵀ` with the matrices of each row's expert: (rows, H, out_features), undefined after the last end.

        Differentiable in x and the factors. For the backward it keeps them, and no block of W or ΔW.

        Args:
            x: (rows, in_features), sorted by expert.
            matrices: Pristine W of all experts, (E, H, out_features, in_features).
            ends: int32 (E,), where the rows of each expert end.
        """
        return recomputed(_Grouped(ends), self, x, matrices)

    def by_block(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, Bᵀ and their scale by half, block and expert, (H, K, E, rank, …), padded by zeros; differentiable."""
        scale = whole_scale(self.rank_scale, self.scaling, torch.promote_types(self.A.dtype, torch.float32))
        A, B = self._padded(self.A, self.cols), self._padded(self.B.T, self.rows)
        return A, B, self._by_block(scale.view(-1, 1))

    def _by_block(self, of_ranks: Tensor) -> Tensor:
        (E, H, K, _), ranks, rank = self.rows.order.shape, self.ranks, max(self.ranks)
        if len(set(ranks)) > 1:
            sources = [own.start + i if i < own.stop - own.start else -1 for own in slices(ranks) for i in range(rank)]
            of_ranks = F.pad(of_ranks.unflatten(0, (E * H, -1)), (0, 0, 0, 1))[:, sources].flatten(0, 1)
        return of_ranks.view(E, H, K, rank, -1).permute(1, 2, 0, 3, 4)

    def _padded(self, factor: Tensor, side: Side) -> Tensor:
        own, padding = self._by_block(factor), side.order.shape[3] - factor.shape[1]
        if larger := side.labels.shape[2] % len(self.ranks):  # the other blocks have a column of padding already
            own = torch.cat([own[:, :larger], F.pad(own[:, larger:, ..., :-1], (0, 1))], 1)
        return F.pad(own, (0, padding)) if padding else own


@dataclass(frozen=True)
class _Grouped:
    """The route of a stack, for rows that are sorted by expert, which end at ``ends``, int32 (E,)."""

    ends: Tensor

    def forward(self, stack: Stack, x: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
        output, factors = x.new_zeros(len(x), *matrices.shape[1:3]), stack.by_block()
        for part in self._parts(stack, x, matrices):
            A, B, _ = part.own(factors)
            delta = part.delta(part.entries(), A, B)
            y = _product(part.sort(x[part.rows], stack.cols), delta.mT, part.ends, part.count)
            del delta
            output[part.rows] = part.unsort(y, stack.rows).to(x.dtype)
        return output

    plain = forward  # which is differentiable

    def backward(self, stack: Stack, g: Tensor, x: Tensor, matrices: Tensor, needs_x: bool) -> Gradients:
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in (stack.A, stack.B)]
            *by_block, of_ranks = stack.with_factors(*leaves).by_block()
        grad_A, grad_B = totals = [torch.zeros_like(factor) for factor in by_block]
        grad_x = torch.zeros_like(x) if needs_x else None
        for part in self._parts(stack, x, matrices):
            entries, (A, B, scale) = part.entries(), part.own((*(factor.detach() for factor in by_block), of_ranks))
            sorted_x = part.sort(x[part.rows], stack.cols)
            sorted_g = part.sort(g[part.rows].transpose(0, 1), stack.rows)
            grad_delta = _outer(sorted_g, sorted_x, part.ends, part.count).to(A.dtype)
            del sorted_x
            if entries is not None:
                grad_delta.mul_(entries)
            for total, own in zip(totals, (torch.bmm(B, grad_delta), torch.bmm(A, grad_delta.mT) * scale), strict=True):
                total[:, :, part.experts] = own.view(*total.shape[:2], -1, *total.shape[3:])
            del grad_delta
            if grad_x is not None:
                y = _product(sorted_g, part.delta(entries, A, B), part.ends, part.count)
                grad_x[part.rows] = part.unsort(y, stack.cols).sum(1)
        of_A, of_B = torch.autograd.grad(by_block, leaves, (grad_A, grad_B))
        return grad_x, of_A, of_B

    def _parts(self, stack: Stack, x: Tensor, matrices: Tensor) -> Iterator[_Part]:
        """Parts of the experts; on a GPU one, since only the device knows the ends."""
        ends, count = self.ends, len(self.ends)
        if x.device.type != "cpu":
            ends = torch.cat([ends[:-1], ends.new_full((1,), len(x))])  # a group can't start after the rows of none
            yield _Part(stack, matrices, slice(0, count), slice(0, len(x)), ends, product_dtype(x.dtype, x.device.type))
            return
        stops = [0, *ends.tolist()]
        hit = [i for i in range(count) if stops[i] < stops[i + 1]]
        few = len(hit) <= min(PARTS, count // 2)  # as in decoding
        parts = PARTS if matrices.numel() > LARGE * len(stack.ranks) else 1
        groups, size = (hit, 1) if few else (range(count), -(-count // parts))
        for own in (groups[i : i + size] for i in range(0, len(groups), size)):
            experts, start, stop = slice(own[0], own[-1] + 1), stops[own[0]], stops[own[-1] + 1]
            if start < stop:
                rows, dtype = slice(start, stop), product_dtype(x.dtype, "cpu")
                yield _Part(stack, matrices, experts, rows, ends[experts] - start, dtype)


@dataclass(frozen=True)
class _Part:
    """C neighboring experts, their rows of x, and where those of each end: int32 (C,). The H·K·C blocks are ordered by
    half, block and expert. `dtype` is that of the products."""

    stack: Stack
    matrices: Tensor
    experts: slice
    rows: slice
    ends_of_rows: Tensor
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """C."""
        return len(self.ends_of_rows)

    @cached_property
    def expert_of_rows(self) -> Tensor:
        """The expert of each row, int64 (rows,)."""
        places = torch.arange(self.rows.stop - self.rows.start, device=self.ends_of_rows.device)
        experts: Tensor = torch.bucketize(places, self.ends_of_rows[:-1], right=True) + self.experts.start
        return experts

    @cached_property
    def ends(self) -> Tensor:
        """Where the rows of each block end, int32 (H·K·C,)."""
        (_, H, K, _), count = self.stack.rows.order.shape, self.rows.stop - self.rows.start
        blocks = torch.arange(H * K, dtype=torch.int32, device=self.ends_of_rows.device)
        ends: Tensor = (blocks[:, None] * count + self.ends_of_rows).flatten()
        return ends

    def own(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A, Bᵀ with the scale, and the scale, float32 or wider, of each block."""
        wide = torch.promote_types(self.stack.A.dtype, torch.float32)
        A, B, scale = (factor[:, :, self.experts].flatten(0, 2).to(wide) for factor in factors)
        return A, B * scale, scale

    def sort(self, x: Tensor, side: Side) -> Tensor:
        """x (rows, size), or (H, rows, size) with those of each half, sorted by block: (H·K·rows, p)."""
        _, H, K, p = side.order.shape
        if side.is_sorted:
            own: Tensor = x.unflatten(-1, (K, p)).transpose(-2, -3).expand(H, K, -1, p)
        else:
            index = side.order.permute(1, 2, 0, 3).index_select(2, self.expert_of_rows).long()
            own = x.unsqueeze(-3).expand(H, K, -1, -1).gather(3, index)
        return own.flatten(0, 2).to(self.dtype).contiguous()  # grouped_mm refuses the views of a single block

    def unsort(self, y: Tensor, side: Side) -> Tensor:
        """y (H·K·rows, p) in natural order: (rows, H, size)."""
        _, H, K, p = side.order.shape
        by_row: Tensor = y.view(H, K, -1, p).permute(2, 0, 1, 3).flatten(2)
        return by_row if side.is_sorted else by_row.gather(2, side.places.index_select(0, self.expert_of_rows).long())

    def entries(self) -> Tensor | None:
        """The diagonal blocks of W, (H·K·C, p of outputs, p of inputs), or nothing without M."""
        if self.stack.modulation == "none":
            return None
        rows, cols, matrices = self.stack.rows, self.stack.cols, self.matrices[self.experts]
        _, H, K, p = rows.order.shape
        if rows.is_sorted and cols.is_sorted:
            entries: Tensor = matrices.unflatten(3, (K, -1)).unflatten(2, (K, p)).diagonal(dim1=2, dim2=4)
            return entries.permute(1, 4, 0, 2, 3).flatten(0, 2)
        labels, order, of_cols = (table[self.experts] for table in (rows.labels, rows.order, cols.order))
        number = torch.arange(len(labels) * H, device=labels.device).view(-1, H, 1)
        of_rows = (number * K + labels).flatten()  # the block of each row
        index = of_cols.flatten(0, 2).long().index_select(0, of_rows).view(*labels.shape, -1)
        entries = matrices.gather(3, index).flatten(0, 2)
        del index  # twice the bytes of the blocks
        places = ((number * labels.shape[2]).unsqueeze(-1) + order).permute(1, 2, 0, 3)
        return entries.index_select(0, places.flatten()).view(-1, p, of_cols.shape[3])

    def delta(self, entries: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """The blocks of ΔW from those of M."""
        product = torch.bmm(B.mT, A)
        return (product if entries is None else product.mul_(entries)).to(self.dtype)


def _product(a: Tensor, b: Tensor, ends: Tensor, experts: int) -> Tensor:
    """The rows of each group (rows, p) times its matrix (groups, p, q): (rows, q)."""
    if _has_grouped_mm(a):
        calls = _calls(a, ends, experts)
        return torch.cat([grouped_mm(a[rows], b[groups], offs=offs) for rows, groups, offs in calls])  # type: ignore[misc]
    return torch.cat([own @ matrix for own, matrix in zip(_groups(a, ends), b, strict=True)])


def _outer(a: Tensor, b: Tensor, ends: Tensor, experts: int) -> Tensor:
    """The sum of `aᵀ b` over the rows of each group: (groups, p, q), zero without rows."""
    if _has_grouped_mm(a):
        calls = _calls(a, ends, experts)
        sums = torch.cat([grouped_mm(a[rows].mT, b[rows], offs=offs) for rows, _, offs in calls])  # type: ignore[misc]
        is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # some GPUs leave anything there (pytorch 172439, 174314)
        return sums if a.device.type == "cpu" else sums.masked_fill_(is_empty[:, None, None], 0)
    return torch.stack([own.mT @ other for own, other in zip(_groups(a, ends), _groups(b, ends), strict=True)])


def _groups(a: Tensor, ends: Tensor) -> Sequence[Tensor]:
    """The rows of each group; waits for the device."""
    return a.tensor_split(ends[:-1].cpu().long())


def _calls(a: Tensor, ends: Tensor, experts: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, groups and ends of each call of `grouped_mm`, which takes MOST_GROUPS at most: those of some blocks of all
    experts."""
    blocks, step = len(ends) // experts, max(1, MOST_GROUPS // experts)
    count = len(a) // blocks
    for first in range(0, blocks, step):
        rows, groups = (slice(first * size, min(first + step, blocks) * size) for size in (count, experts))
        yield rows, groups, ends[groups] - rows.start


def _has_grouped_mm(a: Tensor) -> bool:
    """Whether `grouped_mm` takes these rows. It can't be differentiated twice, nor called in transforms."""
    if grouped_mm is None or a.dtype not in GROUPED_DTYPES or torch.is_grad_enabled() or is_transformed(a):
        return False
    return a.device.type == "cpu" or (a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= (8, 0))
