"""What the adapters in a layer's slots add to a batch, each token with its own slot's adapter.

vLLM fuses layers with the same input, such as q, k and v, into one. Its adapters are then those of one weight: W_q, W_k
and W_v on a diagonal, whose input is x once for each of them. So a fused layer takes as few products as a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from smoa.maths.blocks import take_columns
from smoa.maths.factors import BlockRun, runs_of
from smoa.maths.kernels.branch import product_dtype
from smoa.maths.kernels.shared import Gathered, StackedFactors, diagonal_of
from smoa.maths.scale import rank_scale
from smoa.serving.rows import Plan, Rows, Tokens, products
from smoa.serving.saved import Loaded

Parts = Sequence[Loaded | None]
"""An adapter's factors of each slice of a layer; None where it leaves a slice as it is."""
FEW_ROWS = 4
"""Up to so many are sorted sooner by PyTorch than by NumPy."""


class Slots:
    """The adapters in the slots of a layer: ``lora`` are vLLM's own, ``groups`` those of SMoA."""

    def __init__(self) -> None:
        self.lora: set[int] = set()
        self.groups: list[Group] = []

    @torch.inference_mode()  # vLLM calls it within and without
    def set(self, slot: int, parts: Parts, sizes: Sequence[int], weight: Callable[[], Tensor]) -> None:
        """Put an adapter into a free slot.

        Args:
            slot: Its number.
            parts: The adapter's factors.
            sizes: out_features of each slice of the layer.
            weight: Gives W (out_features, in_features). Called if no adapter with these blocks and ranks was here.
        """
        key = tuple(part and (part.ranks, part.modulation, part.digest) for part in parts)
        group = next((group for group in self.groups if group.key == key), None)
        if group is None:
            self.groups = [group for group in self.groups if group.members]  # an empty one waits for its like till then
            group = Group(key, parts, sizes, weight())
            self.groups.append(group)
        group.write(slot, parts)

    def reset(self, slot: int) -> None:
        """Free a slot."""
        self.lora.discard(slot)
        for group in self.groups:
            group.members -= {slot}

    def clear(self) -> None:
        """Forget all adapters, and the weights that they multiply."""
        self.lora.clear()
        self.groups.clear()

    def add_to(self, output: Tensor, x: Tensor, tokens: Tokens) -> None:
        """Add to the output (tokens, out_features) what SMoA adapters make of the input x (tokens, in_features)."""
        for group in self.groups:
            if not group.members.isdisjoint(tokens.of_slot):
                group.add_to(output, x, tokens)


class Group:
    """Adapters of a layer with the same blocks, ranks and modulation, by slot.

    Args:
        key: What they have in common.
        parts: The first adapter's factors.
        sizes: out_features of each slice of the layer.
        weight: W (out_features, in_features).
    """

    def __init__(self, key: object, parts: Parts, sizes: Sequence[int], weight: Tensor) -> None:
        self.key, self.members = key, frozenset[int]()
        slices = [(part, rows) for part, rows in zip(parts, weight.split(list(sizes)), strict=True) if part is not None]
        starts = accumulate(sizes, initial=0)
        spans = [(start, size) for part, start, size in zip(parts, starts, sizes, strict=False) if part is not None]
        self.spans = [(0, sum(sizes))] if len(spans) == len(parts) else spans
        blocks = [part.blocks(weight.device) for part, _ in slices]
        runs: list[BlockRun] = []
        entries: list[list[Tensor]] = []
        row = col = rank = 0
        for (part, own_weight), own in zip(slices, blocks, strict=True):
            for run in runs_of(*own.shape, part.ranks):
                diagonal = [] if part.modulation == "none" else diagonal_of(own, [run], own_weight)
                last = runs[-1] if runs else None
                if last is not None and (last.height, last.width, last.rank) == (run.height, run.width, run.rank):
                    runs[-1] = replace(last, count=last.count + run.count)
                    entries[-1] += diagonal
                else:
                    places = run.first_row + row, run.first_col + col, run.first_rank + rank
                    runs.append(BlockRun(run.count, run.height, run.width, run.rank, *places))
                    entries.append(diagonal)
            row, col, rank = row + own.out_features, col + own.in_features, rank + sum(part.ranks)
        dtype = product_dtype(weight.dtype, weight.device.type)
        self.diagonal = [torch.cat(own).to(dtype) for own in entries if own]
        height, width = max(part.B.shape[0] for part, _ in slices), max(part.A.shape[1] for part, _ in slices)
        self.stack = StackedFactors(
            weight.new_zeros(0, rank, width, dtype=torch.float32),
            weight.new_zeros(0, height, rank, dtype=torch.float32),
            weight.new_zeros(0, rank, dtype=torch.float32),
            replace(blocks[0], is_contiguous=True),  # inputs are sorted before
            tuple(runs),
        )
        plain = len(blocks) == 1 and blocks[0].is_contiguous
        self.cols = None if plain else torch.cat([own.orders.cols for own in blocks])
        firsts = accumulate((own.out_features for own in blocks), initial=0)
        rows = [own.orders.rows_inverse + first for own, first in zip(blocks, firsts, strict=False)]
        self.rows = None if all(own.is_contiguous for own in blocks) else torch.cat(rows)
        self.factors = self.stack.gathered(torch.empty(0, dtype=torch.int64, device=weight.device))
        self._of_plan: tuple[Plan, list[Gathered]] | None = None

    def write(self, slot: int, parts: Parts) -> None:
        """Put an adapter's factors into a slot."""
        A, B, scale = (part.new_zeros(1, *part.shape[1:]) for part in (self.stack.A, self.stack.B, self.stack.scale))
        first = 0
        for part in (part for part in parts if part is not None):
            ranks = slice(first, first := first + sum(part.ranks))
            A[0, ranks, : part.A.shape[1]] = part.A.to(A)
            B[0, : part.B.shape[0], ranks] = part.B.to(B)
            scale[0, ranks] = (rank_scale(part.block_scale, part.ranks) * part.scaling).to(scale)
        own = replace(self.stack, A=A, B=B, scale=scale).gathered(torch.zeros(1, dtype=torch.int64, device=A.device))
        slots = len(self.factors[0][0])
        if slot >= slots:
            more = max(slot + 1, slots * 5 // 4) - slots
            self.factors = [(_grown(all_A, more), _grown(all_B, more)) for all_A, all_B in self.factors]
        for (all_A, all_B), (own_A, own_B) in zip(self.factors, own, strict=True):
            all_A[slot], all_B[slot] = own_A[0], own_B[0]
        self.members |= {slot}
        self._of_plan = None

    def add_to(self, output: Tensor, x: Tensor, tokens: Tokens) -> None:
        """Add to the output what the group's adapters make of the input."""
        rank = max(run.rank for run in self.stack.runs) if self.diagonal else 0
        plan = tokens.plan(self.members, rank, x.device)
        apart = ([(A[slot : slot + 1], B[slot : slot + 1]) for A, B in self.factors] for slot, _ in plan.apart)
        diagonal = (lambda: self.diagonal) if self.diagonal else None
        inputs = lambda rows: _sorted(x[rows], self.cols)  # noqa: E731
        for rows, y in products(self.stack, plan, inputs, diagonal, apart, self._factors(plan)):
            self._add(output, rows, y)

    def _factors(self, plan: Plan) -> Iterable[Gathered]:
        """The factors of each token, kept for the next step where they take no more room than the adapters."""
        if self._of_plan is not None and self._of_plan[0] is plan:
            return self._of_plan[1]
        found = (
            [(A.index_select(0, slots), B.index_select(0, slots)) for A, B in self.factors]
            for _, slots in plan.together
        )
        if sum(len(slots) for _, slots in plan.together) > len(self.members):
            return found
        self._of_plan = plan, list(found)
        return self._of_plan[1]

    def _add(self, output: Tensor, rows: Rows, y: Tensor) -> None:
        y, first = _sorted(y, self.rows), 0
        for start, size in self.spans:
            target, own = output.narrow(1, start, size), y.narrow(1, first, size)
            if isinstance(rows, slice):
                target[rows].add_(own)
            else:
                target.index_add_(0, rows, own.to(target.dtype))
            first += size


def _grown(factors: Tensor, more: int) -> Tensor:
    return torch.cat([factors, factors.new_zeros(more, *factors.shape[1:])])


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return x
    return x.index_select(1, order) if len(x) <= FEW_ROWS else take_columns(x, order, x.new_empty(len(x), len(order)))
