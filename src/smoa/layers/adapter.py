"""One adapter in one layer: its settings there, and when its blocks are decided."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from smoa.config import SmoaConfig
from smoa.errors import PartitionError
from smoa.layers.distributed import awaits_process_group, from_rank_zero, onloaded, whole
from smoa.layers.partition import AdapterBuffers, Derived, PartitionSpec, are_unchanged, versions
from smoa.maths.blocks import UNDECIDED, Blocks, Orders, check_labels
from smoa.maths.kernels.autograd import is_transformed
from smoa.maths.scale import rank_scale


class Adapter:
    """One adapter in one layer: its settings there, its blocks and block scales.

    The layer keeps row labels, column labels and block scales, in `stores`. `spec` says how they are decided, `ranks`
    is r_k of every block, ΔW is scaled by alpha / r, and `halves` is H in a layer with a stack of matrices.
    """

    def __init__(
        self,
        stores: tuple[AdapterBuffers, AdapterBuffers, AdapterBuffers],
        name: str,
        config: SmoaConfig,
        spec: PartitionSpec,
        ranks: tuple[int, ...],
        alpha: float,
        halves: int = 1,
    ) -> None:
        self.stores, self.name, self.config, self.spec = stores, name, config, spec
        self.ranks, self.halves = ranks, halves
        self.r, self.modulation = sum(ranks), spec.modulation
        self.scaling = alpha / self.r
        """As configured; the layer's own `scaling` may have been changed since."""
        self.pending = True
        """Whether labels and scales are not decided yet: they will be loaded, or computed when they are needed."""
        self._derived: Derived | None = None

    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels, column labels and block scales, as they are stored."""
        rows, cols, scale = self.stores
        return rows[self.name], cols[self.name], scale[self.name]

    def decide(self, row_labels: Tensor, col_labels: Tensor, block_scale: Tensor) -> None:
        """Write labels and scales."""
        for store, tensor in zip(self.stores, (row_labels, col_labels, block_scale), strict=True):
            store.write(self.name, tensor)
        self.pending = False
        self.derived()

    def move(self, device: torch.device) -> None:
        """Move labels and scales to a device."""
        for store in self.stores:
            store[self.name] = store[self.name].to(device)

    def prepare(self, layer: Any, defer: bool) -> None:
        """Make room for labels and scales in the layer, and decide them unless they will be loaded, or can't be yet."""
        device = torch.device("cpu") if layer.stored_weight().is_meta else layer.stored_weight().device
        rows, cols, scale = layer.saved_shapes(self.ranks)[2:]
        for store, shape in zip(self.stores[:2], (rows, cols), strict=True):
            store[self.name] = torch.full(shape, UNDECIDED, dtype=torch.uint8, device=device)
        self.stores[2][self.name] = torch.ones(scale, device=device, dtype=torch.float32)
        if defer:
            return
        for other in layer.adapters.values():
            same = other.config is self.config and other.spec == self.spec and len(other.ranks) == len(self.ranks)
            if same and not other.pending:  # TRL's reference, to which it copies factors alone
                self.decide(*other.saved())
                return
        if not awaits_process_group() and (parts := self._computed(layer)) is not None:
            self.decide(*parts)

    def decide_from(self, layer: Any) -> None:
        """Compute what is pending. Raises PartitionError if the base weight is on the meta device."""
        if self.is_valid():  # from a file, or from another process
            self.pending = False
        elif (parts := self._computed(layer)) is not None:
            self.decide(*parts)
        else:
            raise PartitionError("the base weight is on the meta device; load the weights before the adapter is used")

    def _computed(self, layer: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Labels and scales by rank 0's weight; None if that is on the meta device."""
        with onloaded([layer.get_base_layer()]), gather_params_ctx(layer.stored_weight()):  # for DeepSpeed ZeRO-3
            weight = None if layer.stored_weight().is_meta else whole(layer.pristine_weight())  # for FSDP2
            return from_rank_zero(lambda: None if weight is None else self.spec.decide(len(self.ranks), weight))

    def is_valid(self) -> bool:
        """Whether the labels are there, and a partition."""
        rows, cols, _ = self.saved()
        if rows.is_meta:
            return False
        try:
            for labels in (*rows.view(-1, rows.shape[-1]), *cols.view(-1, cols.shape[-1])):
                check_labels(labels, len(self.ranks), "labels")
        except PartitionError:
            return False
        return True

    def derived(self) -> Derived:
        """What follows from labels and scales; made anew if they were replaced or written to.

        Of labels that a transform (`torch.func`) has put in place for a call, nothing is kept. A compiled model doesn't
        look: labels don't change while it runs.
        """
        known, saved = self._derived, self.saved()
        rows, cols, scale = saved
        is_seen = torch.compiler.is_compiling() or rows.is_meta  # offloaded
        if known is not None and (is_seen or are_unchanged(saved, known.saved, known.versions)):
            return known
        if known is not None and is_transformed(*saved):
            blocks = known.blocks
            if isinstance(blocks, Blocks):
                blocks = Blocks(rows, cols, len(self.ranks), Orders.of(rows, cols), False, blocks.shape)
            return Derived(saved, [], (), scale, rank_scale(scale, self.ranks), blocks)
        exact = known.block_scale if known is not None and known.rounds_to(scale) else None
        if known is not None and exact is not None and known.has_labels(rows, cols):
            known.saved, known.versions = saved, versions(saved)  # written to without a change, as by DDP's broadcasts
            return known
        with torch.inference_mode(False):  # what is made in inference mode can't be used in training
            self._derived = Derived.of(saved, self.ranks, self.halves, exact)
        self.stores[0].changes += 1
        return self._derived
