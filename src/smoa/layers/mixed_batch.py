"""One batch under several adapters: the rows of those that have the same blocks and ranks are computed together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smoa.layers.layer import SmoaLayer
from smoa.layers.weight_cache import BLOCKS, DIAGONAL, is_sharded, tensor_state
from smoa.maths.kernels.choice import Kernels, prefers_shared
from smoa.maths.kernels.operators import is_transformed
from smoa.maths.kernels.shared import Gathered, StackedFactors, diagonal_of, shared
from smoa.maths.scale import MODULATIONS
from smoa.state import chosen_kernels


def mixed_outputs(layer: SmoaLayer, x: Tensor, adapter_names: Sequence[str]) -> Iterator[tuple[Tensor | None, Tensor]]:
    """What the adapters of a batch add to the output of a linear layer, with the rows that they add it to.

    Adapters with the same blocks, ranks, modulation and dropout take one product (`smoa.maths.kernels.shared`), but for
    those with so many tokens that ΔW is formed at less cost.

    Args:
        layer: The layer.
        x: (rows, …, in_features).
        adapter_names: The adapter of each row. A name that the layer does not have adds nothing.

    Yields:
        The rows, None for all of them, and the output (rows, …, out_features).
    """
    batch = _batch_of(layer, x, tuple(adapter_names))
    with layer.onloaded(batch.names):
        layer.gather(*batch.names)
        for name, rows in batch.apart:
            yield rows, layer.branch_output(x[rows], name)
        for group in batch.groups:
            yield group.rows, group.output(x if group.rows is None else x[group.rows])


def _batch_of(layer: SmoaLayer, x: Tensor, adapter_names: tuple[str, ...]) -> MixedBatch:
    """How to compute a batch: as the last one, if it had the same adapters, and nothing of the layer has changed."""
    tokens, kernels = x.shape[1:-1].numel(), chosen_kernels()
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(x):
        return MixedBatch(layer, adapter_names, tokens, x.device, kernels)
    state = adapter_names, tokens, x.device, kernels, layer.partition_version
    last = layer.last_batch
    if last is None or last[0] != state:
        last = state, MixedBatch(layer, adapter_names, tokens, x.device, kernels)
        layer.last_batch = last
    batch: MixedBatch = last[1]
    return batch


def shared_output(layer: SmoaLayer, x: Tensor, adapter_name: str) -> Tensor:
    """`x ΔWᵀ` of one adapter, by the product that many could share, for x as a branch is given it."""
    flat = x.reshape(1, -1, x.shape[-1])
    (group,) = _batch_of(layer, flat, (adapter_name,)).groups
    return group.product(flat).view(*x.shape[:-1], layer.out_features)


class MixedBatch:
    """How a layer computes the rows of a batch: ``apart`` are adapters with their rows, ``groups`` take one product."""

    def __init__(
        self, layer: SmoaLayer, adapter_names: Sequence[str], tokens: int, device: torch.device, kernels: Kernels
    ) -> None:
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows_of.setdefault(name, []).append(row)
        self.names = [name for name in rows_of if name in layer.ranks]
        self.apart: list[tuple[str, Tensor]] = []
        together: dict[Hashable, list[str]] = {}
        for name in self.names:
            rows = rows_of[name]
            layer.decide_partition(name)
            if prefers_shared(layer.ranks[name], tokens * len(rows), kernels):
                together.setdefault(layer.mixed_key(name), []).append(name)
            else:
                self.apart.append((name, torch.tensor(rows, device=device)))
        if (cache := layer.smoa_weight_cache) is not None:
            cache.retain({BLOCKS, DIAGONAL}, [name for name, _ in self.apart])
        self.groups = []
        for names in together.values():
            slot_of = {name: slot for slot, name in enumerate(names)}
            rows = [row for row, name in enumerate(adapter_names) if name in slot_of]
            slots = torch.tensor([slot_of[adapter_names[row]] for row in rows], device=device)
            chosen = None if len(rows) == len(adapter_names) else torch.tensor(rows, device=device)
            self.groups.append(MixedGroup(layer, names, chosen, slots))


class MixedGroup:
    """Adapters of a layer that take one product.

    Args:
        layer: The layer.
        names: The adapters.
        rows: Their rows of the batch; None for all.
        slots: The place in `names` of each of these rows' adapter.
    """

    def __init__(self, layer: SmoaLayer, names: list[str], rows: Tensor | None, slots: Tensor) -> None:
        self.layer, self.names, self.rows = layer, names, rows
        self.slots = slots if len(names) > 1 else slots[:1]  # the rows of one adapter are tokens of one group
        factors = layer.update(names[0]).factors
        self.blocks, self.runs, self.modulation = factors.blocks, factors.runs(), layer.modulation[names[0]]
        parts = [part._modules for part in (layer.smoa_A, layer.smoa_B)]
        self._owners: list[Any] = [modules[name]._parameters for modules in parts for name in names]
        self._keeps = not is_sharded(layer)  # whose storage is refilled unnoticed
        self._stacked: tuple[Any, tuple[StackedFactors, Gathered | None]] | None = None

    def output(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ` for the group's rows of the layer's input x, each with the ΔW of its own adapter."""
        x = self.layer.branch_input(x, self.names[0])
        return self.product(x.reshape(len(x), -1, x.shape[-1])).view(*x.shape[:-1], self.layer.out_features)

    def product(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ` for x (rows, tokens, in_features) as a branch is given it."""
        stack, gathered = self.stack()
        diagonal = self.diagonal if MODULATIONS[self.modulation].anchors else None
        y = shared(stack, x.reshape(len(self.slots), -1, x.shape[-1]), self.slots, diagonal, gathered)
        return y.view(*x.shape[:-1], y.shape[-1])

    def stack(self) -> tuple[StackedFactors, Gathered | None]:
        """The stacked factors, and without gradients those of each row: as at the last call, unless one has changed.

        Those of each row are kept only where they take no more memory than the adapters.
        """
        layer, scaling = self.layer, [self.layer.scaling[name] for name in self.names]
        state = None if torch.is_grad_enabled() or not self._keeps else (scaling, *self._state_of_factors())
        if state is not None and self._stacked is not None and self._stacked[0] == state:
            return self._stacked[1]
        stack = StackedFactors.of([layer.update(name).factors for name in self.names])
        if state is None:
            return stack, None
        found = stack, stack.gathered(self.slots) if len(self.slots) <= len(self.names) else None
        self._stacked = state, found
        return found

    def _state_of_factors(self) -> tuple[list[int], list[int]]:
        """Changes when a factor is written or replaced."""
        weights = [owner.get("weight") for owner in self._owners]
        try:
            versions = [weight._version for weight in weights]
        except (RuntimeError, AttributeError):  # made in inference mode, or sharded
            versions = []
        return list(map(id, weights)), versions

    def diagonal(self) -> Sequence[Tensor]:
        """The diagonal blocks of M for each run of blocks; copies are kept where calls may keep something."""

        def make() -> Sequence[Tensor]:
            anchor = MODULATIONS[self.modulation].anchor(self.layer.pristine_weight(), self.blocks)
            assert anchor is not None
            return diagonal_of(self.blocks, self.runs, anchor)

        cache = self.layer.open_cache([], self.slots)
        if cache is None:
            return make()
        digest = self.layer.labels_digest[self.names[0]]
        kept = cache.get((DIAGONAL, self.modulation, str(digest)), tensor_state(self.layer.stored_weight()), make)
        return make() if kept is None else kept
