"""Replaces a loaded adapter by a saved one in place, so that compiled code stays valid.

The new tensors take the shape of the loaded adapter, the slot: blocks of smaller rank are padded with zeros, and B is
multiplied by the ratio of alpha / r. The slot keeps its name, config, rank and scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn

from smoa.compat import PREFIX
from smoa.config import SmoaConfig
from smoa.errors import ConfigError, MergeError, named
from smoa.layer import SmoaLayer, smoa_layers
from smoa.partition import slices

ALIKE = ("num_blocks", "num_blocks_pattern", "modulation", "bias")
"""Settings by which tensors are read, whatever their ranks."""


@torch.no_grad()
def hotswap_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Replace the loaded adapter `adapter_name` of a PeftModel, compiled or not, by the one in a folder or on the Hub.

    The new adapter must have the same num_blocks, modulation and bias, no block of larger rank, and no layer that the
    loaded one lacks. Layers that only the loaded one has do nothing until the next swap. The loaded adapter's dropout
    stays.

    Raises:
        ConfigError: one of the two is not a SMoA adapter, or their settings or layers don't match.
        MergeError: the loaded adapter is merged.
    """
    slot: Any = getattr(model, "_orig_mod", model)
    old, new = getattr(slot, "peft_config", {}).get(adapter_name), PeftConfig.from_pretrained(str(path))
    if not isinstance(slot, PeftModel) or not isinstance(old, SmoaConfig) or not isinstance(new, SmoaConfig):
        raise ConfigError(f"{path}: can't replace {adapter_name!r}; both must be SMoA adapters")
    if different := [name for name in ALIKE if getattr(old, name) != getattr(new, name)]:
        raise ConfigError(f"{path}: differs from the loaded adapter in {', '.join(different)}; load it by another name")
    state = load_peft_weights(str(path), device="cpu")
    layers = {n: layer for n, layer in smoa_layers(slot.get_base_model()).items() if adapter_name in layer.smoa_A}
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise MergeError(f"{name}: {adapter_name!r} is merged; call unmerge_adapter first")
        A, B = (f"{PREFIX}{name}.smoa_{part}.weight" for part in "AB")
        if A in state and B in state:
            with named(path):
                state[A], state[B] = _padded(name, layer, adapter_name, state[A], state[B], new)
        else:  # a layer that only the slot has
            state[A], state[B] = map(torch.zeros_like, layer.factors(adapter_name))
    if foreign := {key.partition(".smoa_")[0] for key in state if ".smoa_" in key} - {PREFIX + name for name in layers}:
        raise ConfigError(f"{path}: has {sorted(foreign)[0]}, which {adapter_name!r} lacks; load it by another name")
    old.scale, old.other_base = new.scale, new.other_base
    set_peft_model_state_dict(slot, state, adapter_name=adapter_name)


def _padded(
    name: str, layer: SmoaLayer, adapter: str, A: Tensor, B: Tensor, config: SmoaConfig
) -> tuple[Tensor, Tensor]:
    """The ranks of each block padded with zeros to those of the slot, and B multiplied by the ratio of the scales."""
    own, shape = layer.adapters[adapter], (layer.out_features, layer.in_features)
    slot, ranks, count = own.ranks, config.ranks_of(name, shape=shape), layer.matrix_count or 1
    if any(theirs > ours for theirs, ours in zip(ranks, slot, strict=True)):
        said = f"block ranks {list(ranks)}, more than the {list(slot)} of the loaded adapter"
        raise ConfigError(f"{name} has {said}; load the adapter of the largest rank first")
    ratio = config.alpha_of(name, sum(ranks), shape) / sum(ranks) / own.scaling
    dtype = torch.promote_types(B.dtype, layer.factors(adapter)[1].dtype)  # the file's may round what the slot can hold
    used = [block.start + rank for block, r in zip(slices(slot), ranks, strict=True) for rank in range(r)]
    wide_A = A.new_zeros(count, sum(slot), A.shape[1])
    wide_B = B.new_zeros(B.shape[0], count, sum(slot), dtype=dtype)
    wide_A[:, used] = A.view(count, -1, A.shape[1])
    wide_B[:, :, used] = B.view(B.shape[0], count, -1).to(dtype) * ratio
    return wide_A.flatten(0, 1), wide_B.flatten(1)
