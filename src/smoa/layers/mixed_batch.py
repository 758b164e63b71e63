"""One batch under several adapters: the rows of those that have the same blocks and ranks are computed together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smoa.layers.distributed import gather, onloaded_for
from smoa.layers.layer import SmoaLayer, add_rows, is_plain_linear, linear_weight
from smoa.layers.partition import are_unchanged, versions
from smoa.layers.weight_cache import DIAGONAL, STACKED, open_cache, tensor_state
from smoa.maths.kernels.autograd import only_values, without_autocast
from smoa.maths.kernels.shared import Gathered, StackedFactors, diagonal_of, prefers_shared, shared


def add_mixed(
    layer: SmoaLayer, result: Tensor, x: Tensor, adapter_names: Sequence[str], alone: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """The output of a linear layer's base layer plus what the adapters of a batch add to it.

    Adapters with the same blocks, ranks, modulation and dropout take one product (`smoa.maths.kernels.shared`), but for
    those with so many tokens that ΔW is formed at less cost.

    Args:
        layer: The layer.
        result: (rows, …, out_features). It is written to if nobody else can hold it.
        x: (rows, …, in_features).
        adapter_names: The adapter of each row. A name that the layer does not have adds nothing.
        alone: Computes one adapter's output with ΔW formed. Nothing of it may be kept: adapters may be many.
    """
    batch = _batch_of(layer, x, tuple(adapter_names))
    is_own = only_values(x) and is_plain_linear(layer.base_layer)
    with onloaded_for(layer, batch.names):
        gather(layer, *batch.names)
        for name, rows in batch.apart:
            result, is_own = add_rows(result, rows, alone(x[rows], name), is_own), True
        for group in batch.groups:
            own = layer.branch_input(x if group.rows is None else x[group.rows], group.names[0])
            if is_own and group.rows is None and result.is_contiguous():
                group.product(own, result)
            else:
                result, is_own = add_rows(result, group.rows, group.product(own), is_own), True
    return result


def _batch_of(layer: SmoaLayer, x: Tensor, adapter_names: tuple[str, ...]) -> MixedBatch:
    """How to compute a batch: as the last one, if it had the same adapters, and nothing of the layer has changed."""
    tokens = x.shape[1:-1].numel()
    if layer.training or not only_values(x):
        return MixedBatch(layer, adapter_names, tokens, x.device)
    cache = layer.smoa_weight_cache
    changes = layer.changes() if cache is None else cache.watch.state(layer)
    state = adapter_names, tokens, x.device, changes
    last = layer.last_batch
    if last is None or last[0] != state or (cache is None and not last[1].is_current()):
        last = state, MixedBatch(layer, adapter_names, tokens, x.device)
        layer.last_batch = last
    batch: MixedBatch = last[1]
    return batch


def shared_output(layer: SmoaLayer, x: Tensor, adapter_name: str) -> Tensor:
    """`x ΔWᵀ` of one adapter, by the product that many could share, for x as a branch is given it."""
    flat = x.reshape(1, -1, x.shape[-1])
    (group,) = _batch_of(layer, flat, (adapter_name,)).groups
    product: Tensor = group.product(x)
    return product


def _key(layer: SmoaLayer, name: str) -> Hashable:
    """Adapters for which it is the same can be computed in one product."""
    own, dropout = layer.adapters[name], layer.smoa_dropout[name]
    p = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    dtype = next(layer.smoa_A[name].parameters()).dtype
    return own.ranks, own.modulation, p, dtype, layer.derived(name).digest


class MixedBatch:
    """How a layer computes the rows of a batch: ``apart`` are adapters with their rows, ``groups`` take one product."""

    def __init__(
        self,
        layer: SmoaLayer,
        adapter_names: Sequence[str],
        tokens: int,
        device: torch.device,
    ) -> None:
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows_of.setdefault(name, []).append(row)
        self.names = [name for name in rows_of if name in layer.adapters]
        trains_weight = torch.is_grad_enabled() and layer.stored_weight().requires_grad  # has no gradient in `shared`
        self.apart: list[tuple[str, Tensor]] = []
        together: dict[Hashable, list[str]] = {}
        for name in self.names:
            rows = rows_of[name]
            layer.decide_partition(name)
            if not trains_weight and prefers_shared(max(layer.adapters[name].ranks), tokens * len(rows)):
                together.setdefault(_key(layer, name), []).append(name)
            else:
                self.apart.append((name, torch.tensor(rows, device=device)))
        if (cache := layer.smoa_weight_cache) is not None:
            cache.retain({DIAGONAL}, ())
        self.groups = []
        for names in together.values():
            slot_of = {name: slot for slot, name in enumerate(names)}
            rows = [row for row, name in enumerate(adapter_names) if name in slot_of]
            slots = torch.tensor([slot_of[adapter_names[row]] for row in rows], device=device)
            chosen = None if len(rows) == len(adapter_names) else torch.tensor(rows, device=device)
            self.groups.append(MixedGroup(layer, names, chosen, slots))
        self._stores = layer.smoa_row_labels, layer.smoa_col_labels, layer.smoa_block_scale
        self._saved = self._labels_and_scales()
        self._versions = versions(self._saved)

    def is_current(self) -> bool:
        """Whether the labels and block scales are those with which this was made."""
        return are_unchanged(self._labels_and_scales(), self._saved, self._versions)

    def _labels_and_scales(self) -> list[Tensor]:
        return [store[name] for store in self._stores for name in self.names]


@dataclass(frozen=True)
class KeptFactors:
    """The factors of each row of a batch."""

    gathered: Gathered

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(part.nbytes for pair in self.gathered for part in pair)


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
        self._chosen = None if len(self.slots) == len(names) else self.slots
        factors = layer.update(names[0]).factors
        self.blocks, self.runs, self.modulation = factors.blocks, factors.runs(), layer.adapters[names[0]].modulation
        self._scale: tuple[Hashable, Tensor] | None = None

    def product(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        """`x ΔWᵀ` for x (rows, …, in_features) as a branch is given it, each row with the ΔW of its own adapter; or
        `total` (rows, …, out_features), contiguous, with it added."""
        diagonal = None if self.modulation == "none" else self.diagonal
        by_group = x.reshape(len(self.slots), -1, x.shape[-1])
        into = None if total is None else total.view(len(self.slots), -1, total.shape[-1])
        y = shared(self.blocks, self.runs, by_group, self.factors(), diagonal, into)
        return y.view(*x.shape[:-1], y.shape[-1])

    def factors(self) -> Gathered | Callable[[], Gathered]:
        """The factors of each row, or what gathers them.

        They are kept while a cache is open and no change is seen, unless they would take more memory than the adapters.
        Else they are made in each call: averages of weights and some optimizers write past the version counters.
        """
        cache = None if len(self.slots) > len(self.names) else open_cache(self.layer, self.names, self.slots)
        if cache is not None:
            kept = cache.get((STACKED, *self.names), self, lambda: KeptFactors(self._stack().gathered(self._chosen)))
            if kept is not None:
                return kept.gathered
        return partial(self._stack().gathered, self._chosen)

    def _stack(self) -> StackedFactors:
        layer = self.layer
        with without_autocast(self.slots.device.type):  # which can't stack every dtype
            if torch.is_grad_enabled():
                return StackedFactors.of([layer.update(name).factors for name in self.names])
            parts = layer.smoa_A, layer.smoa_B
            A, B = (torch.stack([linear_weight(part[name]) for name in self.names]) for part in parts)
        return StackedFactors(A, B, self._stacked_scale(B.dtype), self.blocks, self.runs)

    def _stacked_scale(self, dtype: torch.dtype) -> Tensor:
        """s_k of each adapter for factors of this dtype, as at the last call, unless α/r has changed."""
        layer, dtype = self.layer, torch.promote_types(dtype, torch.float32)
        state = dtype, tuple(layer.scaling[name] for name in self.names)
        if (kept := self._scale) is None or kept[0] != state:
            scales = [layer.update(name).factors.scale(dtype) for name in self.names]
            self._scale = kept = state, torch.stack(scales)
        return kept[1]

    def diagonal(self) -> Sequence[Tensor]:
        """The diagonal blocks of M for each run of blocks; copies are kept where calls may keep something."""

        def make() -> Sequence[Tensor]:
            return diagonal_of(self.blocks, self.runs, self.layer.pristine_weight())

        cache = open_cache(self.layer, [], self.slots)
        if cache is None:
            return make()
        digest = self.layer.derived(self.names[0]).digest
        kept = cache.get((DIAGONAL, str(digest)), tensor_state(self.layer.stored_weight()), make)
        return make() if kept is None else kept
