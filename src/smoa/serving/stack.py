"""The adapters of one layer, stacked by slot: those with the same blocks, ranks and modulation take one product.

A fused layer, which vLLM makes of layers with the same input, such as q, k and v, is one weight of more blocks: those
of W_q, W_k and W_v, each with columns of x. So it takes as few products as a plain layer, which has one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain, islice

import torch
from torch import Tensor

from smoa.layers.rows import Plan, RowsBySlot, add_by_plan
from smoa.maths.blocks import Blocks, Orders
from smoa.maths.factors import BlockRun, runs_of
from smoa.maths.kernels.shared import Gathered
from smoa.serving.saved import SavedLayer

Parts = Sequence[SavedLayer | None]
"""An adapter's factors of each slice of a layer; None where it leaves a slice as it is."""


class LayerStack:
    """The adapters of a layer that have the same blocks, ranks and modulation, by slot.

    Args:
        parts: An adapter's factors; it is not written yet.
        sizes: out_features of each slice of the layer.
        device: The weight's.
        dtype: Of the factors: float32 or wider.
    """

    def __init__(self, parts: Parts, sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        starts = accumulate(sizes, initial=0)
        slices = [(part, start, size) for part, start, size in zip(parts, starts, sizes, strict=False) if part]
        own = [part for part, _, _ in slices]
        blocks = [part.blocks(device) for part in own]
        self.members: frozenset[int] = frozenset()
        """The slots that are taken."""
        self.spans = None if len(own) == len(parts) else [(start, size) for _, start, size in slices]
        self.blocks = blocks[0] if len(parts) == 1 else _fused(blocks, [start for _, start, _ in slices])
        are_slices = len(parts) > 1 and all(each.is_contiguous for each in blocks)
        self._of_copies = replace(self.blocks, is_contiguous=True) if are_slices else None
        """The blocks of an x that is there once for each slice; None if their coordinates must be sorted."""
        self.runs, self._pieces = _runs(blocks, own)
        self.modulation = own[0].modulation
        shapes = [(0, 1, run.rank, run.count, size) for run in self.runs for size in (run.width, run.height)]
        empty = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.factors: Gathered = list(zip(empty[::2], empty[1::2], strict=True))
        """A of each run and B with the scale in it, (slots, 1, rank, blocks, width or height)."""
        self._rank = 0 if self.modulation == "none" else max(rank for part in own for rank in part.ranks)
        self._kept: tuple[Plan | None, Gathered] = None, []

    def write(self, slot: int, parts: Parts) -> None:
        """Put an adapter into a slot; there is more room if need be."""
        room = len(self.factors[0][0])
        if slot >= room:
            larger = max(slot + 1, room * 5 // 4)
            self.factors = [tuple(_grown(part, larger) for part in pair) for pair in self.factors]  # type: ignore[misc]
        pieces = chain.from_iterable(part.in_runs() for part in parts if part)
        for (A, B), count in zip(self.factors, self._pieces, strict=True):
            of_A, of_B, scales = zip(*islice(pieces, count), strict=True)
            A[slot, 0] = torch.cat(of_A, 1)
            B[slot, 0] = torch.cat(of_B, 1).to(B) * torch.cat(scales).to(B)[:, None]
        self.members |= {slot}
        self._kept = None, []

    def reset(self, slot: int) -> None:
        """Free a slot."""
        self.members -= {slot}

    def add_to(self, output: Tensor, x: Tensor, rows: RowsBySlot, diagonal: Sequence[Tensor]) -> None:
        """Add to an output (rows, …, out_features) what each row's adapter makes of x (rows, …, in_features).

        Args:
            output: Is written to.
            x: The layer's input.
            rows: The slot of each row.
            diagonal: The blocks of M, as `diagonal_of` gives them for `blocks` and `runs`; none without modulation.
        """
        plan = rows.plan(self.members, self._rank, x.shape[1:-1].numel(), x.device)
        if self._kept[0] is not plan:  # they take no more room than the adapters
            own = [(A.index_select(0, plan.slots), B.index_select(0, plan.slots)) for A, B in self.factors]
            self._kept = plan, own
        blocks = self._of_copies or self.blocks
        if self._of_copies is not None:
            x = x.repeat(*[1] * (x.ndim - 1), blocks.in_features // x.shape[-1])
        add_by_plan(output, x, plan, blocks, self.runs, self._kept[1], diagonal if self._rank else None, self.spans)


def _grown(part: Tensor, room: int) -> Tensor:
    larger = part.new_zeros(room, *part.shape[1:])
    larger[: len(part)] = part
    return larger


def _fused(blocks: Sequence[Blocks], starts: Sequence[int]) -> Blocks:
    """The blocks of slices of one weight, whose rows begin at these: W has them all, x once for each slice."""
    rows = torch.cat([own.orders.rows + start for own, start in zip(blocks, starts, strict=True)])
    firsts = accumulate((own.out_features for own in blocks), initial=0)
    rows_inverse = torch.cat([own.orders.rows_inverse + first for own, first in zip(blocks, firsts, strict=False)])
    cols, cols_inverse = (torch.cat([own.orders[place] for own in blocks]) for place in (2, 3))
    row_labels, col_labels = (
        torch.cat([getattr(own, side) for own in blocks]) for side in ("row_labels", "col_labels")
    )
    orders = Orders(rows, rows_inverse, cols, cols_inverse)
    return Blocks(row_labels, col_labels, sum(own.num_blocks for own in blocks), orders)


def _runs(blocks: Sequence[Blocks], parts: Sequence[SavedLayer]) -> tuple[list[BlockRun], list[int]]:
    """The runs of all slices, where neighbors of one shape are one run, and of how many of the slices' own each is."""
    runs, pieces, row, col, rank = list[BlockRun](), list[int](), 0, 0, 0
    for own, part in zip(blocks, parts, strict=True):
        for run in runs_of(*own.shape, part.ranks):
            last = runs[-1] if runs else None
            if last is not None and (last.height, last.width, last.rank) == (run.height, run.width, run.rank):
                runs[-1], pieces[-1] = replace(last, count=last.count + run.count), pieces[-1] + 1
            else:
                firsts = run.first_row + row, run.first_col + col, run.first_rank + rank
                runs.append(BlockRun(run.count, run.height, run.width, run.rank, *firsts))
                pieces.append(1)
        row, col, rank = row + own.out_features, col + own.in_features, rank + sum(part.ranks)
    return runs, pieces
