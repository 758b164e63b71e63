"""Merging the adapters of a model: what is checked before, `merged` for a while, and what rounding takes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.errors import MergeError, UnsupportedModuleError
from smoa.layers.distributed import why_not_plain
from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import smoa_layers
from smoa.tuner.tying import refuse_shared, weight_id

M = TypeVar("M", bound=nn.Module)


@contextmanager
def merged(model: M, *, lossy: bool = False, reports: bool = True) -> Iterator[M]:
    """Merge the active adapters into `model` while the context is open: it then computes as fast as its base.

    Each weight W is replaced by W + ΔW and restored bit for bit at the end, also after an exception, a failed merge
    included. The diagonal blocks of W are kept on the CPU meanwhile. In 16 bits, one warning says how much of ΔW is
    rounded away. Adapters can't be trained meanwhile: no gradients are recorded, and a change has no effect.

    Args:
        model: A model with SMoA adapters, in PEFT or not.
        lossy: Merge quantized layers too, whose W + ΔW is quantized again, and sharded and offloaded ones.
        reports: Whether to warn of what rounding takes, which computes ΔW once more.

    Raises:
        MergeError: adapters are merged already, by another `merged` too, or can't be merged.
        UnsupportedModuleError: a layer is quantized, sharded or offloaded, and `lossy` is False.
    """
    for name, layer in (layers := smoa_layers(model)).items():
        if layer.merged:
            raise MergeError(f"{name}: {layer.merged_adapters} are merged already; call unmerge_adapter first")
        if not lossy and (why := why_not_plain(layer)):
            raise UnsupportedModuleError(
                f"{name}: its weight is {why}; use the model unmerged, or pass lossy=True to merge it all the same "
                "(a quantized W + ΔW is quantized again)"
            )
    check_merge_allowed(model)
    with torch.no_grad():
        try:
            with losses_reported(model, rounded=True) if reports else nullcontext():
                for layer in layers.values():
                    with onload_layer(layer):
                        layer.merge()
            yield model
        finally:
            for layer in smoa_layers(model).values():  # those of a model that was unloaded meanwhile stay merged
                if layer.merged:
                    with onload_layer(layer):
                        layer.unmerge()


@torch.no_grad()
def check_all_finite(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise MergeError if merging these adapters, None for the active ones, gives NaN or infinite weights."""
    for name, layer in smoa_layers(model).items():
        try:
            with onload_layer(layer):  # accelerate may have offloaded its weights
                layer.check_merge(adapter_names)
        except MergeError as error:
            raise MergeError(f"{name}: {error}") from None


def check_merge_allowed(model: nn.Module) -> None:
    """Raise MergeError if a merge would be wrong for a layer, and note which layers need a weight of their own."""
    layers = {name: layer for name, layer in smoa_layers(model).items() if layer.adapters}  # not of deleted ones
    refuse_shared((name, layer.stored_weight(), dict(layer.smoa_A.items())) for name, layer in layers.items())
    for name, layer in layers.items():
        if isinstance(layer.base_layer, AuxiliaryTrainingWrapper):
            raise MergeError(
                f"{name}: trainable_token_indices replaces rows of its weight, and a merge would lose what the "
                "adapter adds to them; keep the adapter unmerged, or train again without one of the two"
            )
    used = (own for module in model.modules() for own in module._parameters.values() if own is not None)
    users = Counter(map(weight_id, used))  # several modules use that of tied embeddings
    adapted = Counter(weight_id(layer.stored_weight()) for layer in layers.values())
    for layer in layers.values():
        if not isinstance(layer, ParamWrapper):
            weight = weight_id(layer.stored_weight())
            layer.shares_weight = users[weight] > adapted[weight]


@contextmanager
def losses_reported(model: nn.Module, rounded: bool = False) -> Iterator[None]:
    """Warn how much of ΔW was lost in quantized layers, and `rounded` ones of 16 bits, merged in the context."""
    measured = [
        layer
        for layer in smoa_layers(model).values()
        if layer.quantization_backend or (rounded and layer.stored_weight().itemsize == 2)
    ]
    losses: list[tuple[float, float]] = []
    for layer in measured:
        layer.losses = losses
    try:
        yield
    finally:
        for layer in measured:
            layer.losses = None
    if size := sum(size**2 for _, size in losses):
        error = (sum(error**2 for error, _ in losses) / size) ** 0.5
        warnings.warn(
            "merged weights were quantized again, or rounded to 16 bits: the relative error of ΔW is "
            f"{error:.3g} in {len(losses)} weights. Keep the adapter unmerged, or load it on the model in float32",
            stacklevel=4,
        )
