"""When a layer's partitions are decided, and by whom: at once, at first use, by a file, or by another process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from smoa.errors import PartitionError
from smoa.layers.distributed import awaits_process_group, from_rank_zero, whole
from smoa.maths.modulation import BlockLayout
from smoa.maths.spectrum import UNDECIDED, PartitionKind, SpectralPartition, make_partition
from smoa.maths.spectrum_cache import cached_spectral_scores

T = TypeVar("T")


class PartitionState(BaseTunerLayer):
    """The labels of all adapters on one layer: uint8 buffers (out_features,) and (in_features,) by adapter name."""

    in_features: int
    out_features: int

    def __init__(self) -> None:
        self.layout: dict[str, BlockLayout] = {}
        self.pending_partition: dict[str, PartitionKind] = {}
        self.smoa_row_labels = BufferDict(persistent=True)
        self.smoa_col_labels = BufferDict(persistent=True)

    def stored_weight(self) -> Tensor:
        """The base layer's weight as it is stored."""
        raise NotImplementedError

    def pristine_weight(self) -> Tensor:
        """The base weight as it was before any merge, (out_features, in_features)."""
        raise NotImplementedError

    def _add_labels(self, adapter_name: str, kind: PartitionKind, defer: bool) -> None:
        device = self.stored_weight().device
        self.smoa_row_labels[adapter_name] = _undecided(self.out_features, device)
        self.smoa_col_labels[adapter_name] = _undecided(self.in_features, device)
        self.pending_partition[adapter_name] = kind
        if not defer and not awaits_process_group() and self._compute_labels(adapter_name):
            del self.pending_partition[adapter_name]

    def decide_partition(self, adapter_name: str) -> None:
        """Compute the labels of an adapter unless they have been computed or loaded already.

        Of several processes rank 0 computes them for all, so every rank must call this.
        """
        if adapter_name not in self.pending_partition:
            return
        if not self._has_valid_labels(adapter_name) and not self._compute_labels(adapter_name):
            raise PartitionError("the base weight is on the meta device; load the weights before the adapter is used")
        del self.pending_partition[adapter_name]

    def share_partition(self, source: str, adapter_name: str) -> None:
        """Give the adapter the labels of the adapter `source`, which has as many blocks."""
        partition = self.partition(source)
        self.smoa_row_labels[adapter_name].copy_(partition.row_labels)
        self.smoa_col_labels[adapter_name].copy_(partition.col_labels)
        self.pending_partition.pop(adapter_name, None)

    def _compute_labels(self, adapter_name: str) -> bool:
        """Compute the labels from the weight, which is rank 0's; False, and nothing, if that is on the meta device."""
        kind, num_blocks = self.pending_partition[adapter_name], self.layout[adapter_name].num_blocks
        found = self._from_weight(
            partial(_labels_of, num_blocks, kind),
            everywhere=kind != "spectral",  # costs nothing, and keeps the random generators of all ranks in step
        )
        if found is None:
            return False
        for buffers, labels in zip((self.smoa_row_labels, self.smoa_col_labels), found, strict=True):
            if buffers[adapter_name].device.type == "meta":
                buffers[adapter_name] = labels
            else:
                buffers[adapter_name].copy_(labels)
        return True

    def _from_weight(self, compute: Callable[[Tensor], T], everywhere: bool = False) -> T | None:
        """`compute` of rank 0's whole pristine weight, on every rank; None if that weight is on the meta device."""
        with gather_params_ctx(self.stored_weight()):  # whole under DeepSpeed ZeRO-3
            is_meta = self.stored_weight().device.type == "meta"
            weight = None if is_meta else whole(self.pristine_weight())  # and where FSDP2 has sharded it
            return from_rank_zero(lambda: None if weight is None else compute(weight), everywhere)

    def _has_valid_labels(self, adapter_name: str) -> bool:
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        if rows.device.type == "meta":
            return False
        try:
            SpectralPartition(rows, cols, self.layout[adapter_name].num_blocks)
        except PartitionError:
            return False
        return True

    def partition(self, adapter_name: str) -> SpectralPartition:
        """The adapter's partition; computed now if nothing has decided it yet."""
        self.decide_partition(adapter_name)
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        return SpectralPartition(rows, cols, self.layout[adapter_name].num_blocks)


def _labels_of(num_blocks: int, kind: PartitionKind, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column labels of a weight, on the CPU."""
    partition = make_partition(weight, num_blocks, kind, cached_spectral_scores)
    return partition.row_labels.cpu(), partition.col_labels.cpu()


def _undecided(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), UNDECIDED, dtype=torch.uint8, device=device)
