"""One batch under several adapters: the rows of those that have the same blocks and ranks are computed together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from smoa.adapter import Adapter
from smoa.adapter_names import Call
from smoa.distributed import gather, linear_weight, onloaded_for
from smoa.kept import open_snapshot
from smoa.kernels.autograd import only_values, without_autocast
from smoa.kernels.factors import runs_of
from smoa.kernels.plan import Part, add_by_plan
from smoa.kernels.scale import whole_scale
from smoa.kernels.shared import Diagonal, Gathered, entries_of, gathered, shared
from smoa.layer import SmoaLayer, add_rows
from smoa.partition import Blocks
from smoa.route import is_plain_linear

T = TypeVar("T")


def add_mixed(layer: SmoaLayer, result: Tensor, x: Tensor, call: Call, of_slot: dict[int, str]) -> Tensor:
    """The output of a linear layer's base layer plus what the adapters of a call add to it.

    Adapters with the same blocks, ranks, modulation and dropout take one product (`smoa.kernels.shared`), but for
    those with so many tokens that ΔW is formed at less cost.

    Args:
        layer: The layer.
        result: (rows, …, out_features). It is written to if nobody else can hold it.
        x: (rows, …, in_features).
        call: Has the slot of each row.
        of_slot: The adapter of each slot whose adapter the layer has; others add nothing.
    """
    rows, values, tokens = call.rows(len(x)), only_values(x), x.shape[1:-1].numel()
    is_own = values and is_plain_linear(layer.base_layer)  # else others may hold the base layer's output
    with onloaded_for(layer, of_slot.values()):
        gather(layer, *of_slot.values())
        snapshot = open_snapshot(layer, of_slot.values()) if values else None

        def kept(key: Hashable, make: Callable[[], T]) -> T:
            found = None if snapshot is None else snapshot.get(key, make)
            return make() if found is None else found

        for group in kept((layer, call.of_slot), lambda: _groups(layer, of_slot)):
            own = layer.branch_input(x, group.names[0])
            plan = rows.plan(group.members, group.rank, tokens, x.device, call.trains or not values)
            if values:
                result, is_own = result if is_own else result.clone(), True
                factors = kept(group, group.factors)
                entries = kept(group.key_of_entries, group.entries) if group.rank else None
                add_by_plan(result, own, plan, factors, Diagonal(group.blocks, group.runs, entries))
                continue
            for part in plan.parts:
                result, is_own = add_rows(result, part.rows, group.output(own[part.rows], part), is_own), True
    return result


def _groups(layer: SmoaLayer, of_slot: dict[int, str]) -> list[Group]:
    """The adapters that take one product each."""
    groups: dict[Any, Group] = {}
    A_of, B_of = layer.smoa_A._modules, layer.smoa_B._modules  # looked up once, for adapters may be many
    for slot, name in of_slot.items():
        own = layer.decided(name)
        A, B = linear_weight(A_of[name]), linear_weight(B_of[name])
        key = own.blocks, own.ranks, own.modulation, layer.dropped(name), A.dtype
        if (group := groups.get(key)) is None:
            group = groups[key] = Group(layer, own)
        group.slots.append(slot)
        group.names.append(name)
        group.tensors.append((A, B, own.rank_scale))
    return list(groups.values())


class Group:
    """Adapters of a layer that take one product, as its first does."""

    def __init__(self, layer: SmoaLayer, own: Adapter) -> None:
        self.layer, self.blocks = layer, cast(Blocks, own.blocks)
        self.runs = runs_of(*self.blocks.shape, own.ranks)
        self.key_of_entries = layer, self.blocks, *(run.shape for run in self.runs)
        self.rank = 0 if own.modulation == "none" else max(own.ranks)
        self.slots: list[int] = []
        self.names: list[str] = []
        self.tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        """A, B and the block scale of each rank, of each adapter."""

    @cached_property
    def members(self) -> frozenset[tuple[int, int]]:
        """The slots of the adapters, each with its number."""
        return frozenset((slot, number) for number, slot in enumerate(self.slots))

    def factors(self, slots: Tensor | None = None) -> Gathered:
        """The factors of each adapter, or of these among them, with the scale in B; differentiable."""
        A, B, scales = zip(*self.tensors, strict=True)
        device, dtype = B[0].device, torch.promote_types(B[0].dtype, torch.float32)
        scaling = [[self.layer.scaling[name]] for name in self.names]
        with without_autocast(device.type):  # which can't stack every dtype
            scale = whole_scale(torch.stack(scales), torch.tensor(scaling, dtype=dtype, device=device), dtype)
            return gathered(self.runs, A, B, scale, slots)

    def entries(self) -> Sequence[Tensor]:
        """Those of the diagonal blocks of M, which groups with the same blocks share."""
        return entries_of(self.blocks, self.runs, self.layer.pristine_weight())

    def diagonal(self) -> Diagonal:
        """The diagonal blocks of M."""
        return Diagonal(self.blocks, self.runs, self.entries() if self.rank else None)

    def output(self, x: Tensor, part: Part) -> Tensor:
        """`x ΔWᵀ` for the rows of a part, differentiable."""
        chosen: Any = part.slots
        if part.forms:
            name = self.names[0 if chosen is None else int(chosen)]
            layer: Any = self.layer  # a linear one
            output: Tensor = layer.apply_update(layer.update(name), x)
            return output
        diagonal = self.diagonal if self.rank else self.diagonal()
        y = shared(x.reshape(part.groups, -1, x.shape[-1]), partial(self.factors, chosen), diagonal)
        return y.view(*x.shape[:-1], y.shape[-1])
