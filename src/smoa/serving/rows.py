"""Which rows of a batch, each with its own adapter, take a product together, and for which ΔW is formed.

Few rows of many adapters take one product for all (`shared`). An adapter with so many that forming its ΔW costs less is
served apart (`formed`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from smoa.maths.kernels.shared import Places, prefers_shared

SHORT_RUN = 4
"""Runs of fewer rows take longer one after the other than with a copy of the factors for each row."""
Rows = slice | Tensor
"""Some rows of a tensor."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that take one product.

    Args:
        rows: Which of the batch.
        slots: The slot of each row, or the one of all.
        places: The same, as places in the plan's slots; None if it is all of them, each once.
        forms: Whether ΔW is formed; they are then of one slot.
    """

    rows: Rows
    slots: Tensor
    places: Places | None
    forms: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """The parts of a batch, and all their slots, each once."""

    slots: Tensor
    parts: list[Part]


class RowsBySlot:
    """The slot of each row of a batch, -1 for the base model: a token where tokens are packed, or a whole sample.

    Args:
        slots: In the order of the rows.
        number: Of the batch, which a checkpoint knows it by.
    """

    def __init__(self, slots: Sequence[int], number: int = 0) -> None:
        self.of_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            self.of_slot.setdefault(slot, []).append(row)
        self.of_slot.pop(-1, None)
        self.number = number
        self.kept: dict[Any, tuple[Hashable, Any]] = {}
        """What layers keep for the next call with these rows: the factors of the slots, each once."""
        self._slots = slots
        self._plans: dict[Any, Plan] = {}

    def plan(self, members: frozenset[int] | None, rank: int, tokens: int | None, device: torch.device) -> Plan:
        """How to serve the rows of these slots; layers with the same members share it.

        Args:
            members: The slots; None for all.
            rank: The most of a block, 0 without modulation: then all rows are together.
            tokens: Of each row; None if all rows are to be together, as gradients need it.
            device: Where the rows are.
        """
        key = members, rank, tokens, device
        if key not in self._plans:
            own = {slot: rows for slot, rows in self.of_slot.items() if members is None or slot in members}
            apart = [slot for slot, rows in own.items() if not prefers_shared(rank, (tokens or 0) * len(rows))]
            slots = [slot for slot in own if slot not in apart] + apart
            together = sorted(row for slot, rows in own.items() if slot not in apart for row in rows)
            place_of = {slot: place for place, slot in enumerate(slots)}

            def part(rows: list[int], forms: bool) -> Part:
                found = [self._slots[row] for row in rows]
                found = found[:1] if len(set(found)) == 1 else found
                places = None if found == slots else _places([place_of[slot] for slot in found], rank, device)
                return Part(_chosen(rows, device), torch.tensor(found, device=device), places, forms)

            parts = [part(own[slot], True) for slot in apart] + ([part(together, False)] if together else [])
            self._plans[key] = Plan(torch.tensor(slots, device=device, dtype=torch.int64), parts)
        return self._plans[key]


def _chosen(rows: list[int], device: torch.device) -> Rows:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _places(found: list[int], rank: int, device: torch.device) -> Places:
    """These places of rows, or, on a CPU where mostly neighbors have the same, those of runs of rows."""
    ends = list(accumulate(len(list(same)) for _, same in groupby(found)))
    if device.type != "cpu" or not rank or len(ends) * SHORT_RUN > len(found):
        return torch.tensor(found, device=device)
    return [(first, end, found[first]) for first, end in pairwise([0, *ends])]


class Mark(torch.autograd.Function):
    """Saves the number of a batch as the shape of a tensor without entries. A checkpoint that is not reentrant compares
    the shapes of what is saved when it computes again, and raises CheckpointError under another batch."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(factor.new_empty(number, 0))
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
