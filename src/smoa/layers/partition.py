"""A layer's blocks and block scales: decided at injection, at first use, or by a loaded file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from smoa.errors import PartitionError
from smoa.layers.distributed import awaits_process_group, from_rank_zero, onloaded, whole
from smoa.maths.blocks import UNDECIDED, Blocks, Orders, ascend
from smoa.maths.kernels.plain import is_transformed
from smoa.maths.modulations import MODULATIONS, ModulationKind
from smoa.maths.scale import ScaleKind, block_scale, rank_scale
from smoa.maths.spectrum import PartitionKind, make_partition
from smoa.maths.spectrum_cache import cached_spectral_scores


@dataclass(frozen=True)
class Pending:
    """How to make an adapter's blocks and block scales from the weight."""

    partition: PartitionKind
    modulation: ModulationKind
    scale: ScaleKind

    def decide(self, num_blocks: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels, column labels and block scales (num_blocks,), on the CPU."""
        blocks = make_partition(weight, num_blocks, self.partition, cached_spectral_scores)
        anchor = MODULATIONS[self.modulation].anchor(weight, blocks) if self.scale != "paper" else None
        return blocks.row_labels.cpu(), blocks.col_labels.cpu(), block_scale(self.scale, anchor, blocks)


class KeptBuffers(BufferDict):
    """Buffers that stay in memory when PEFT moves them to the meta device, with the weight that accelerate offloads."""

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        if key not in self or not buffer.is_meta:
            super().__setitem__(key, buffer)  # type: ignore[no-untyped-call]  # PEFT has no types here

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._buffers.copy()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        lost = [key for key, buffer in self._buffers.items() if buffer is not None and buffer.is_meta]
        self._buffers.update({key: before[key] for key in lost})
        return self


class PartitionState(BaseTunerLayer):
    """Blocks and block scales of all adapters on one layer, by adapter name.

    Saved are the labels, uint8 (out_features,) and (in_features,), and the block scales, float32 (num_blocks,), which
    are the part of s_k that comes from the weight. Derived from them when they change, and never saved, are the orders
    of the coordinates, whether the blocks are contiguous, and the scale bits: the scales of all blocks and of all ranks
    as int32, so that a cast of the model's floats can't round them.
    """

    in_features: int
    out_features: int

    def __init__(self) -> None:
        self.ranks: dict[str, tuple[int, ...]] = {}
        self.pending_partition: dict[str, Pending] = {}
        self.smoa_row_labels = KeptBuffers(persistent=True)
        self.smoa_col_labels = KeptBuffers(persistent=True)
        self.smoa_block_scale = KeptBuffers(persistent=True)
        self.smoa_orders = KeptBuffers(persistent=False)
        self.smoa_scale_bits = KeptBuffers(persistent=False)
        self.contiguous: dict[str, bool] = {}
        self._derived_from: dict[str, list[tuple[Tensor, int]]] = {}

    def stored_weight(self) -> Tensor:
        """The base layer's weight as stored."""
        raise NotImplementedError

    def pristine_weight(self) -> Tensor:
        """The base weight before any merge, (out_features, in_features)."""
        raise NotImplementedError

    def partition_shapes(self, adapter_name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of the saved row labels, column labels and block scales."""
        return (self.out_features,), (self.in_features,), (len(self.ranks[adapter_name]),)

    def blocks(self, adapter_name: str) -> Blocks:
        """The adapter's blocks; decided now if they are still pending."""
        self.decide_partition(adapter_name)
        kept = self._refresh(adapter_name)
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        m, n = shape = self.out_features, self.in_features
        orders = Orders(*self.smoa_orders[adapter_name].split([m, m, n, n])) if kept else Orders.of(rows, cols)
        return Blocks(rows, cols, len(self.ranks[adapter_name]), orders, kept and self.contiguous[adapter_name], shape)

    def block_scale(self, adapter_name: str) -> Tensor:
        """Factor of each block's update in addition to α/r: (num_blocks,) float32."""
        self.decide_partition(adapter_name)
        scale = self.smoa_block_scale[adapter_name]
        return self._exact_scale(adapter_name)[: scale.numel()].view(scale.shape)

    def rank_scale(self, adapter_name: str) -> Tensor:
        """`block_scale` of the block that each rank belongs to: (r,) float32."""
        return self._exact_scale(adapter_name)[self.smoa_block_scale[adapter_name].numel() :]

    def _exact_scale(self, adapter_name: str) -> Tensor:
        if torch._C._get_tracing_state() is not None or not self._refresh(
            adapter_name
        ):  # tracing records no views of another dtype
            return self._scales(adapter_name)
        scale: Tensor = self.smoa_scale_bits[adapter_name].view(torch.float32)
        return scale

    def _scales(self, adapter_name: str) -> Tensor:
        """The scales of all blocks, then of all ranks."""
        scale = self.smoa_block_scale[adapter_name]
        return torch.cat([scale.flatten(), rank_scale(scale, self.ranks[adapter_name]).flatten()])

    @contextmanager
    def exact_scales(self) -> Iterator[None]:
        """Keep the block scales in float32 while other code casts this layer's floats."""
        for adapter_name in self.ranks:
            self._refresh(adapter_name)
        yield
        for adapter_name in self.ranks:
            self._refresh(adapter_name)

    def restore_scale(self, adapter_name: str) -> None:
        """Restore the adapter's saved block scales from the kept bits if they were cast."""
        scale = self.smoa_block_scale[adapter_name]
        if scale.dtype != torch.float32:
            bits = self.smoa_scale_bits[adapter_name][: scale.numel()].view(scale.shape)
            self.smoa_block_scale[adapter_name] = bits.view(torch.float32).to(scale.device, copy=True)

    def decide_partition(self, adapter_name: str) -> None:
        """Compute the blocks of an adapter, unless they have been computed or loaded already.

        With several processes, rank 0 computes them for all, so every rank must call this.

        Raises:
            PartitionError: the base weight is on the meta device.
        """
        if adapter_name not in self.pending_partition:
            return
        if not self._has_valid_labels(adapter_name) and not self._compute(adapter_name):
            raise PartitionError("the base weight is on the meta device; load the weights before the adapter is used")
        del self.pending_partition[adapter_name]

    def share_partition(self, source: str, adapter_name: str, with_scale: bool = True) -> None:
        """Give the adapter the blocks of `source`, which must have as many, and its block scales or scales of 1."""
        self.decide_partition(source)
        rows, cols, scale = self._saved(source)
        self._set(adapter_name, (rows, cols, scale if with_scale else torch.ones_like(scale)))
        self.pending_partition.pop(adapter_name, None)

    def refresh_orders(self) -> None:
        """Derive the orders of all adapters again after a load, whose writes a compiled model does not see."""
        self._derived_from.clear()
        for adapter_name in self.ranks:
            self._refresh(adapter_name)

    def _add_partition(self, adapter_name: str, pending: Pending, defer: bool) -> None:
        device = self.stored_weight().device
        device = torch.device("cpu") if device.type == "meta" else device
        rows, cols, scale = self.partition_shapes(adapter_name)
        labels = [torch.full(shape, UNDECIDED, dtype=torch.uint8, device=device) for shape in (rows, cols)]
        self._set(adapter_name, (labels[0], labels[1], torch.ones(scale, dtype=torch.float32, device=device)))
        self.pending_partition[adapter_name] = pending
        if not defer and not awaits_process_group() and self._compute(adapter_name):
            del self.pending_partition[adapter_name]

    def _saved_buffers(self) -> tuple[BufferDict, BufferDict, BufferDict]:
        return self.smoa_row_labels, self.smoa_col_labels, self.smoa_block_scale

    def _saved(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels, column labels and block scales."""
        rows, cols, scale = (buffers[adapter_name] for buffers in self._saved_buffers())
        return rows, cols, scale

    def _set(self, adapter_name: str, saved: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffers, tensor in zip(self._saved_buffers(), saved, strict=True):
            if adapter_name not in buffers or buffers[adapter_name].device.type == "meta":
                buffers[adapter_name] = tensor.clone()
            else:
                buffers[adapter_name].copy_(tensor)
        self._refresh(adapter_name)

    def _refresh(self, adapter_name: str) -> bool:
        """Derive orders and scale bits again if labels or scales have changed. A compiled model skips this.

        Return whether they hold. If a transform has put other labels or scales in place, they don't, and nothing of
        the transform is kept.
        """
        if torch.compiler.is_compiling():
            return True
        self.restore_scale(adapter_name)
        rows, cols, _ = saved = self._saved(adapter_name)
        versions = [0 if tensor.is_inference() else tensor._version for tensor in saved]
        known = self._derived_from.get(adapter_name, [])
        if len(known) == 3 and all(
            tensor is old and version == old_version
            for tensor, version, (old, old_version) in zip(saved, versions, known, strict=True)
        ):
            return True
        if is_transformed(*saved):
            return False
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode can't be used in training
            self._derive_orders(adapter_name, rows, cols)
            self.smoa_scale_bits[adapter_name] = self._scales(adapter_name).view(torch.int32)
        self._derived_from[adapter_name] = list(zip(saved, versions, strict=True))
        return True

    def _derive_orders(self, adapter_name: str, rows: Tensor, cols: Tensor) -> None:
        self.smoa_orders[adapter_name] = torch.cat(Orders.of(rows, cols))
        self.contiguous[adapter_name] = ascend(rows, cols)

    def _compute(self, adapter_name: str) -> bool:
        """Compute labels and scales from rank 0's weight. Return False if that is on the meta device."""
        pending, num_blocks = self.pending_partition[adapter_name], len(self.ranks[adapter_name])
        everywhere = pending.partition != "spectral"  # cheap, and keeps the random generators of all ranks in step
        with onloaded([self.get_base_layer()]), gather_params_ctx(self.stored_weight()):  # for DeepSpeed ZeRO-3
            is_meta = self.stored_weight().device.type == "meta"
            weight = None if is_meta else whole(self.pristine_weight())  # for FSDP2
            found = from_rank_zero(lambda: None if weight is None else pending.decide(num_blocks, weight), everywhere)
        if found is None:
            return False
        self._set(adapter_name, found)
        return True

    def _has_valid_labels(self, adapter_name: str) -> bool:
        rows, cols, _ = self._saved(adapter_name)
        if rows.device.type == "meta":
            return False
        try:
            Blocks(rows, cols, len(self.ranks[adapter_name]))
        except PartitionError:
            return False
        return True
