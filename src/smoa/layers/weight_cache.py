"""An opt-in cache of effective weights, for decoding token by token without merging.

Forming W + ΔW takes a pass over the weight: cheap for a training batch, expensive for one token. While
`cached_weights(model)` is open, each adapted layer keeps after its first call without gradients

- W + ΔW for float32 and float64 weights: as much memory as the adapted weights take;
- the diagonal blocks of ΔW for bfloat16 and float16 weights, and under autocast or TF32, where W + ΔW would round small
  updates away: 1/K of that memory.

A layer drops its cache when its factors, labels, base weight, scaling, active adapters, dtype or device change. It does
not notice writes through `tensor.data`, which PyTorch's version counters leave out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smoa.errors import UnsupportedModuleError
from smoa.maths.blocks import Blocks


@dataclass
class WeightCache:
    """What one layer keeps, and the state that it was computed from."""

    key: Hashable = None
    effective: Tensor | None = None
    updates: list[KeptUpdate] = field(default_factory=list)

    def clear(self) -> None:
        """Drop everything kept."""
        self.key, self.effective, self.updates = None, None, []


@dataclass(frozen=True)
class KeptUpdate:
    """The diagonal blocks of one ΔW, sorted by block."""

    blocks: Blocks
    entries: list[Tensor]

    def apply(self, x: Tensor) -> Tensor:
        """`x ΔWᵀ`: (…, out_features)."""
        x = self.blocks.sort_inputs(x)
        pairs = zip(self.blocks.col_slices, self.entries, strict=True)
        outputs = [x[..., cols] @ entries.T for cols, entries in pairs]
        return self.blocks.unsort_outputs(torch.cat(outputs, -1))


def tensor_state(tensor: Tensor) -> Hashable:
    """A value that changes when the tensor is written to, replaced, cast or moved."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Keep effective weights of `model`'s adapted layers while the context is open, for calls without gradients.

    Only one thread at a time may use the model meanwhile.

    Raises:
        UnsupportedModuleError: a layer's parameters are sharded (FSDP, ZeRO-3). They are refilled between steps
            unnoticed, so the cache could be stale.
    """
    layers: list[Any] = []
    for name, module in model.named_modules():
        if hasattr(module, "smoa_weight_cache"):
            _refuse_sharded(name, module)
            layers.append(module)
    for layer in layers:
        layer.smoa_weight_cache = WeightCache()
    try:
        yield
    finally:
        for layer in layers:
            layer.smoa_weight_cache = None


def _refuse_sharded(name: str, layer: nn.Module) -> None:
    parameters = list(layer.parameters())
    # ZeRO-3 may have left a parameter whole (`ds_id`), but replaces it in every step
    whole = [p for p in parameters if p.numel() and not isinstance(p, DTensor) and not hasattr(p, "ds_id")]
    if not parameters or len(whole) < len(parameters):
        raise UnsupportedModuleError(
            f"{name}: the parameters are sharded over processes, so a cache of them could be stale; "
            "use cached_weights on a model that is whole on one process, or merge the adapter"
        )
