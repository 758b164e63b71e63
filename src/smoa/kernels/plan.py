"""Which rows of a batch, each with its own adapter, take a product together, and for which ΔW is formed.

Few rows of many adapters take one product for all (`shared`). An adapter with so many that forming its ΔW costs less is
served apart (`formed`). A call makes one `RowsBySlot`, and its layers share the plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from smoa.kernels.shared import Diagonal, Gathered, add_shared, formed, of_slots, prefers_shared

Rows = slice | Tensor
"""Some rows of a tensor."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that take one product.

    Args:
        rows: Which of the batch.
        groups: As many groups of rows or tokens, of one adapter each.
        slots: The number of each group's slot among the plan's; None if they are all, in order.
        forms: Whether ΔW is formed; they are then one group.
    """

    rows: Rows
    groups: int
    slots: Tensor | None
    forms: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """The parts of a batch, and the places of all their slots, each once."""

    places: Rows
    parts: list[Part]


class RowsBySlot:
    """The slot of each row of a batch, -1 for the base model: a token where tokens are packed, or a whole sample."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.of_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            self.of_slot.setdefault(slot, []).append(row)
        self.of_slot.pop(-1, None)
        self.slots = slots
        self._plans: dict[Any, Plan] = {}

    def plan(
        self, members: frozenset[tuple[int, int]], rank: int, tokens: int, device: torch.device, trains: bool = False
    ) -> Plan:
        """How to serve the rows of some slots; layers with the same members share it.

        Args:
            members: These slots, each with the place where its factors are.
            rank: The most of a block; 0 without modulation: all rows are together then.
            tokens: Of each row.
            device: Where the rows are.
            trains: Whether gradients are taken, now or when a checkpoint computes again.
        """
        key = members, rank, tokens, device, trains
        if key not in self._plans:
            place_of = dict(members)
            own = {slot: rows for slot, rows in self.of_slot.items() if slot in place_of}
            number_of = {slot: number for number, slot in enumerate(own)}
            apart = [slot for slot, rows in own.items() if not prefers_shared(rank, tokens * len(rows), trains)]
            together = sorted(row for slot, rows in own.items() if slot not in apart for row in rows)

            def part(rows: list[int], forms: bool) -> Part:
                found = [number_of[self.slots[row]] for row in rows]
                lengths = [len(list(same)) for _, same in groupby(found)]
                found = found[:: lengths[0]] if len(set(lengths)) == 1 else found  # then each is a group of rows
                slots = None if found == list(range(len(own))) else torch.tensor(found, device=device)
                return Part(_chosen(rows, device, trains), len(found), slots, forms)

            parts = [part(own[slot], True) for slot in apart] + ([part(together, False)] if together else [])
            self._plans[key] = Plan(_chosen([place_of[slot] for slot in own], device, trains), parts)
        return self._plans[key]


def _chosen(rows: list[int], device: torch.device, trains: bool) -> Rows:
    if rows == list(range(rows[0], rows[0] + len(rows))) and not trains:
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def add_by_plan(
    output: Tensor,
    x: Tensor,
    plan: Plan,
    factors: Gathered,
    diagonal: Diagonal,
    spans: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Add to an output what each row's adapter makes of x, without gradients.

    Args:
        output: (rows, …, features); is written to.
        x: (rows, …, in_features).
        plan: Of the rows.
        factors: Those of the plan's slots.
        diagonal: The blocks of M, which all slots share.
        spans: (first, size) of each slice of the output that has a part of out_features; None if that is all of it.
    """
    for part in plan.parts:
        own = x[part.rows]
        if part.forms:
            chosen = factors if part.slots is None else of_slots(factors, part.slots)
            y = formed(own.flatten(0, -2), chosen, diagonal)
        else:
            groups = own.reshape(part.groups, -1, own.shape[-1])
            writes = isinstance(part.rows, slice) and spans is None and output.is_contiguous()
            y = output[part.rows] if writes else x.new_zeros(*own.shape[:-1], diagonal.blocks.out_features)
            add_shared(y.view(*groups.shape[:2], -1), groups, factors, diagonal, part.slots)
            if writes:
                continue
        y, first = y.view(*own.shape[:-1], y.shape[-1]), 0
        for start, size in spans or [(0, y.shape[-1])]:
            target = output.narrow(-1, start, size)
            if isinstance(part.rows, slice):
                target[part.rows].add_(y.narrow(-1, first, size))
            else:
                target.index_add_(0, part.rows, y.narrow(-1, first, size).to(target.dtype))
            first += size
