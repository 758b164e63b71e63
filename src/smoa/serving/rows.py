"""Which rows of a batch, each with its own adapter, take a product together, and for which ΔW is formed.

Few rows of many adapters take one product for all (`shared`). An adapter with so many that forming its ΔW costs less is
served apart (`formed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from smoa.maths.kernels.shared import Diagonal, Gathered, StackedFactors, formed, shared

Rows = slice | Tensor
"""Some rows of a batch."""
CHUNK = 128
"""So many products of tokens with blocks of W are taken at once: on a CPU larger results do not fit the cache."""
FEW_PRODUCTS = 64
"""Products of an adapter's tokens with the blocks of W, for which it does not pay to form ΔW: for 128 it takes 0.6 of
their time (layers of SmolLM2 135M, 32 adapters)."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows that some slots serve: ``apart`` are slots with so many that their ΔW is formed. The others are
    together, by chunks of rows with the slot of each, or the one of all."""

    apart: list[tuple[int, Rows]]
    together: list[tuple[Rows, Tensor]]


class Tokens:
    """The slot of each row of a batch, -1 for the base model: a token where tokens are packed, or a whole sample.

    Args:
        slots: In the order of the rows.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self.of_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            self.of_slot.setdefault(slot, []).append(row)
        self.of_slot.pop(-1, None)
        self._slots = slots
        self._plans: dict[Any, Plan] = {}

    def plan(self, members: frozenset[int], products: int | None, device: torch.device) -> Plan:
        """How to serve the rows of these slots; layers with the same members share it.

        Args:
            members: The slots.
            products: How many with a block of W a row takes, at most: its tokens times the rank of the block. With 0
                all rows are together, and with None in one chunk, as gradients need it.
            device: Where the rows are.
        """
        key = members, products, device
        if key not in self._plans:
            own = {slot: rows for slot, rows in self.of_slot.items() if slot in members}
            apart = [slot for slot, rows in own.items() if (products or 0) * len(rows) > FEW_PRODUCTS]
            together = sorted(row for slot, rows in own.items() if slot not in apart for row in rows)
            whole = products is None or device.type != "cpu"
            size = len(together) if whole else max(8, CHUNK // max(products or 1, 1))
            chunks = [together[first : first + size] for first in range(0, len(together), max(size, 1))]
            self._plans[key] = Plan(
                [(slot, _rows(own[slot], device)) for slot in apart],
                [(_rows(chunk, device), self._slots_of(chunk).to(device)) for chunk in chunks],
            )
        return self._plans[key]

    def _slots_of(self, rows: list[int]) -> Tensor:
        slots = [self._slots[row] for row in rows]
        return torch.tensor(slots[:1] if len(set(slots)) == 1 else slots)


def _rows(rows: list[int], device: torch.device) -> Rows:
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device, dtype=torch.int64)


def products(
    stack: StackedFactors,
    plan: Plan,
    inputs: Callable[[Rows], Tensor],
    diagonal: Diagonal | None,
    apart: Iterable[Gathered],
    together: Iterable[Gathered | None] = repeat(None),
) -> Iterator[tuple[Rows, Tensor]]:
    """For each part of a plan its rows, and `x ΔWᵀ` of each with its own ΔW: (rows, …, out_features).

    Args:
        stack: The factors.
        plan: Its slots are those of the stack.
        inputs: Gives x of some rows, (rows, …, in_features).
        diagonal: The blocks of M; None without modulation, where the plan has nothing apart.
        apart: The factors of each slot that is apart.
        together: Those of each chunk, where they are at hand and need no gradients.
    """
    for (_, rows), factors in zip(plan.apart, apart, strict=True):
        assert diagonal is not None
        x = inputs(rows)
        yield rows, formed(stack, x.flatten(0, -2), factors, diagonal()).unflatten(0, x.shape[:-1])
    for (rows, slots), gathered in zip(plan.together, together, strict=False):
        x = inputs(rows)
        y = shared(stack, x.reshape(len(slots), -1, x.shape[-1]), slots, diagonal, gathered)
        yield rows, y.reshape(*x.shape[:-1], y.shape[-1])
