"""Merging the adapters of a model: what is checked before, `merged` for a while, and what rounding takes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.errors import MergeError, UnsupportedModuleError, named
from smoa.layers.distributed import why_not_plain
from smoa.layers.layer import SmoaLayer, smoa_layers
from smoa.layers.merging import Loss, weight_id
from smoa.tuner.tying import refuse_shared

LOST = 0.1
"""From this share of ΔW on a merge into 16 bits warns."""
M = TypeVar("M", bound=nn.Module)


@contextmanager
def merged(model: M, *, lossy: bool = False, reports: bool = True) -> Iterator[M]:
    """Merge the active adapters into `model` while the context is open: it then computes as fast as its base.

    Each weight W is replaced by W + ΔW and restored bit for bit at the end, also after an exception, a failed merge
    included. The diagonal blocks of W are kept on the CPU meanwhile. In 16 bits, one warning says how much of ΔW is
    rounded away, from a tenth on. Adapters can't be trained meanwhile: no gradients are recorded, and a change has no
    effect.

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
    check_layers(model, None, safe_merge=False)
    check_merge_allowed(model)
    with torch.no_grad():
        try:
            with losses_reported(model) if reports else nullcontext():
                for layer in layers.values():
                    layer.merge()
            yield model
        finally:
            with ExitStack() as undone:  # if one fails, the others are unmerged all the same
                for name, layer in smoa_layers(model).items():  # those of a model unloaded meanwhile stay merged
                    if layer.merged:
                        undone.callback(named(name)(layer.unmerge))


def check_layers(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Raise MergeError if a merge of these adapters, None for the active ones, would be lost in a layer or, with
    `safe_merge`, gives NaN or infinite weights."""
    for name, layer in smoa_layers(model).items():
        with named(name):
            layer.check_merge(adapter_names, safe_merge)


def check_unmerge(model: nn.Module) -> None:
    """Raise MergeError if undoing the merges would be lost in a layer."""
    for name, layer in smoa_layers(model).items():
        if layer.merged:
            with named(name):
                layer.check_unmerge()


def check_merge_allowed(model: nn.Module) -> None:
    """Raise MergeError if a merge would be wrong for a layer, and note which layers need a weight of their own."""
    for layers in note_users(model):
        refuse_shared(layers)
        for name, layer in layers.items():
            if isinstance(layer.base_layer, AuxiliaryTrainingWrapper):
                raise MergeError(
                    f"{name}: trainable_token_indices replaces rows of its weight, and a merge would lose what the "
                    "adapter adds to them; keep the adapter unmerged, or train again without one of the two"
                )


def note_users(model: nn.Module) -> Iterable[dict[str, SmoaLayer]]:
    """Note which adapted layers share their weight with each other, and which with other modules; the layers of each
    weight, by name."""
    used = (own for module in model.modules() for own in module._parameters.values() if own is not None)
    users, of_weight = Counter(map(weight_id, used)), dict[int, dict[str, SmoaLayer]]()
    for name, layer in smoa_layers(model).items():
        if layer.adapters and not layer.is_computed:  # not of deleted ones; what is computed lies anywhere
            of_weight.setdefault(weight_id(layer.stored_weight()), {})[name] = layer
    for weight, layers in of_weight.items():
        for layer in layers.values():
            layer.shares_weight = users[weight] > len(layers)
            layer.twins = tuple(each for each in layers.values() if each is not layer)
    return of_weight.values()


@contextmanager
def losses_reported(model: nn.Module) -> Iterator[None]:
    """Warn, once, how much of ΔW was lost in quantized layers, and in those of 16 bits, that are merged in the context.

    Rounding to 16 bits leaves an error that means little where it is as often up as down. So what counts there is the
    share that is gone, `1 − ⟨E, ΔW⟩ / ‖ΔW‖²`, where E is what the merge added to W.
    """
    quantized, rounded = list[Loss](), list[Loss]()
    layers = [layer for layer in smoa_layers(model).values() if not layer.is_computed]
    for layer in layers:
        is_rounded = layer.stored_weight().itemsize == 2
        layer.losses = quantized if layer.quantization_backend else rounded if is_rounded else None
    try:
        yield
    finally:
        for layer in layers:
            layer.losses = None
    found = []
    if size := sum(loss.size**2 for loss in quantized):
        error = (sum(loss.error**2 for loss in quantized) / size) ** 0.5
        found.append(f"quantized again: the relative error of ΔW is {error:.3g} in {len(quantized)} weights")
    size = sum(loss.size**2 for loss in rounded)
    if size and (lost := 1 - sum(loss.kept for loss in rounded) / size) > LOST:
        found.append(f"rounded to 16 bits: {lost:.0%} of ΔW is lost in {len(rounded)} weights")
    if found:
        warnings.warn(
            f"merged weights were {', and '.join(found)}. Keep the adapter unmerged, or load it on a float32 model",
            stacklevel=4,
        )
