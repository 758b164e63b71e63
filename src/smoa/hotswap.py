"""Replaces a loaded adapter by a saved one in place, so that compiled code stays valid.

No module and no shape changes. PEFT's own hot-swapping supports only LoRA. Here the new tensors are brought into the
shape of the loaded adapter, the slot, and loaded by PEFT. Blocks of smaller rank are padded with zeros. If alpha / r
differs, B is multiplied by the ratio. The slot keeps its name, config, rank and scale, and can be saved with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, ConfigError, MergeError, first_of
from smoa.files.loading import door
from smoa.files.names import PARTS, PREFIX, adapter_layers, parameter_names
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import slices


@torch.no_grad()
def hotswap_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Replace the loaded adapter `adapter_name` by the one saved in `path`.

    The new adapter must have the same num_blocks, modulation, bias and ensure_weight_tying, no block
    of larger rank, and no layer that the loaded one lacks. Layers that only the loaded one has do nothing until the
    next swap. The loaded adapter's dropout stays. An error changes nothing.

    Args:
        model: A PeftModel, compiled by `torch.compile` or not.
        path: Folder or Hub id.

    Raises:
        ConfigError: one of the two is not a SMoA adapter, or their settings don't match.
        AdapterFileError: the tensors don't fit the model.
        MergeError: the loaded adapter is merged.
    """
    slot: Any = getattr(model, "_orig_mod", model)
    old = getattr(slot, "peft_config", {}).get(adapter_name)
    if not isinstance(slot, PeftModel) or not isinstance(old, SmoaConfig):
        raise ConfigError(f"hotswap_adapter: the model has no SMoA adapter named {adapter_name!r}")
    base: Any = slot.base_model.model
    names = parameter_names(base)  # those in the adapter's file
    layers = {names.get(name, name): layer for name, layer in adapter_layers(base, adapter_name).items()}
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise MergeError(f"{name}: {adapter_name!r} is merged; call unmerge_adapter first")
    with door(path, read=True) as file:
        config = _checked_config(old, str(path))
        if file is None or file.tensors is None:
            raise AdapterFileError(f"{path}: has no {SAFETENSORS_WEIGHTS_NAME} of a SMoA adapter")
        state = _fitted(file.tensors, layers, config, adapter_name, str(path))
        _check_others(slot, state, adapter_name, str(path))
        set_peft_model_state_dict(slot, state, adapter_name=adapter_name)
    for layer in layers.values():
        if layer.smoa_weight_cache is not None:
            layer.smoa_weight_cache.clear()


def _checked_config(old: SmoaConfig, path: str) -> SmoaConfig:
    new = PeftConfig.from_pretrained(path)
    if not isinstance(new, SmoaConfig):
        raise ConfigError(f"{path}: is a {new.peft_type} adapter and can't replace a SMoA adapter")
    fixed = ("num_blocks", "num_blocks_pattern", "modulation", "bias", "ensure_weight_tying")
    different = [name for name in fixed if getattr(new, name) != getattr(old, name)]
    if different:
        differences = "; ".join(f"{name}={getattr(new, name)!r}, not {getattr(old, name)!r}" for name in different)
        raise ConfigError(
            f"{path}: has {differences} as the loaded adapter; load it under another name with load_adapter"
        )
    return new


def _fitted(
    state: dict[str, Tensor], layers: dict[str, SmoaLayer], config: SmoaConfig, adapter_name: str, path: str
) -> dict[str, Tensor]:
    """The adapter's tensors in the shapes and scale of the slot."""
    own = {key for key in state if ".smoa_" in key}
    fitted = {key: tensor for key, tensor in state.items() if key not in own}
    for name, layer in layers.items():
        keys = [f"{PREFIX}{name}.{part}" for part in PARTS]
        if own.isdisjoint(keys):  # it does nothing
            labels = [layer.smoa_row_labels[adapter_name], layer.smoa_col_labels[adapter_name]]
            zeros = map(torch.zeros_like, layer.factors(adapter_name))
            parts = [*zeros, *labels, layer.block_scale(adapter_name)]
        elif own.issuperset(keys):
            parts = _padded(name, layer, [state[key] for key in keys], config, adapter_name, path)
        else:
            raise AdapterFileError(f"{path}: {name} lacks {sorted({*keys} - own)}; the adapter is broken")
        fitted |= dict(zip(keys, parts, strict=True))
        own.difference_update(keys)
    if own:
        raise AdapterFileError(
            f"{path}: has {first_of(sorted(own), 1)} for layers that the loaded adapter does not adapt; load it under "
            "another name with load_adapter"
        )
    return fitted


def _padded(
    name: str, layer: SmoaLayer, parts: list[Tensor], config: SmoaConfig, adapter_name: str, path: str
) -> list[Tensor]:
    """Pad the ranks of each block with zeros to those of the slot, and multiply B by the ratio of the scales."""
    A, B, *partition = parts
    shape, count = (layer.out_features, layer.in_features), layer.matrix_count
    slot, ranks = layer.ranks[adapter_name], config.ranks_of(name, shape=shape)
    if (A.shape, B.shape) != layer.saved_shapes(ranks)[:2]:
        raise AdapterFileError(
            f"{path}: {name} has factors {tuple(A.shape)}, {tuple(B.shape)} that don't fit the layer"
        )
    if any(theirs > ours for theirs, ours in zip(ranks, slot, strict=True)):
        raise ConfigError(
            f"{path}: {name} has block ranks {list(ranks)}, more than the {list(slot)} of the loaded "
            "adapter; load the adapter of the largest rank first"
        )
    r, width, height = sum(ranks), A.shape[1], B.shape[0]
    ratio = config.alpha_of(name, r, shape) / r * layer.r[adapter_name] / layer.alpha[adapter_name]
    wide_A, wide_B = A.new_zeros(count, sum(slot), width), B.new_zeros(height, count, sum(slot))
    for source, target in zip(slices(ranks), slices(slot), strict=True):
        own = slice(target.start, target.start + source.stop - source.start)
        wide_A[:, own] = A.view(count, r, width)[:, source]
        wide_B[:, :, own] = B.view(height, count, r)[:, :, source] * ratio
    return [wide_A.flatten(0, 1), wide_B.flatten(1), *partition]


def _check_others(slot: PeftModel, state: dict[str, Tensor], adapter_name: str, path: str) -> None:
    """Refuse other biases and modules_to_save than the slot's, because missing ones would stay the old adapter's."""
    saved = get_peft_model_state_dict(slot, adapter_name=adapter_name)
    expected, given = (
        {f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items() if ".smoa_" not in key}
        for tensors in (saved, state)
    )
    if expected != given:
        raise AdapterFileError(
            f"{path}: in addition to factors it has {sorted(given - expected) or 'nothing'} and lacks "
            f"{sorted(expected - given) or 'nothing'} compared with {adapter_name!r}; load it under another name"
        )
