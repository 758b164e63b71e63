"""Merging the adapters of a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from smoa.distributed import why_not_plain
from smoa.errors import MergeError, UnsupportedModuleError
from smoa.layer import smoa_layers

M = TypeVar("M", bound=nn.Module)


@contextmanager
def merged(model: M, *, lossy: bool = False) -> Iterator[M]:
    """Merge the active adapters into `model` while the context is open: it then computes as fast as its base.

    Each weight W is replaced by W + ΔW and restored bit for bit at the end, also after an exception. The diagonal
    blocks of W are kept on the CPU meanwhile. Adapters can't be trained meanwhile.

    Args:
        model: A model with SMoA adapters, in PEFT or not.
        lossy: Merge quantized layers too, whose W + ΔW is quantized again, and sharded and offloaded ones.

    Raises:
        MergeError: adapters are merged already.
        UnsupportedModuleError: a layer is quantized, sharded or offloaded, and `lossy` is False.
    """
    layers = smoa_layers(model)
    for name, layer in layers.items():
        if layer.merged:
            raise MergeError(f"{name}: {layer.merged_adapters} are merged already; call unmerge_adapter first")
        if not lossy and (why := why_not_plain(layer)):
            raise UnsupportedModuleError(
                f"{name}: its weight is {why}; use the model unmerged, or pass lossy=True to merge it all the same "
                "(a quantized W + ΔW is quantized again)"
            )
    with torch.no_grad():
        try:
            for layer in layers.values():
                layer.merge()
            yield model
        finally:
            for layer in smoa_layers(model).values():  # those of a model unloaded meanwhile stay merged
                if layer.merged:
                    layer.unmerge()
