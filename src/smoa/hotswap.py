"""Replaces a loaded adapter by a saved one in place, so that compiled code stays valid.

The new tensors take the shape of the loaded adapter, the slot: blocks of smaller rank are padded with zeros, and B is
multiplied by the ratio of alpha / r. The slot keeps its name, config, rank and scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, ConfigError
from smoa.files.base import taking_over
from smoa.files.checks import FACTOR_DTYPES, refuse_merged
from smoa.files.loading import FIXED, door, read_adapter, tensors_of, unlike
from smoa.files.names import PARTS, PREFIX, adapter_layers, embeddings_of, is_own, places_loaded, saved_names
from smoa.layers.distributed import refuse_writing
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import slices

REMEDY = "load it under another name with load_adapter"


@torch.no_grad()
def hotswap_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Replace the loaded adapter `adapter_name` of a PeftModel, compiled or not, by the one in a folder or on the Hub.

    The new adapter must have the same num_blocks, modulation, bias, ensure_weight_tying and trainable_token_indices,
    no block of larger rank, and no layer that the loaded one lacks. Layers that only the loaded one has do nothing
    until the next swap. The loaded adapter's dropout stays. An error changes nothing.

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
    names, layers = saved_names(base), adapter_layers(base, adapter_name)
    refuse_merged(layers, adapter_name)
    with door(path):
        new = PeftConfig.from_pretrained(str(path))
        if not isinstance(new, SmoaConfig):
            raise ConfigError(f"{path}: is a {new.peft_type} adapter and can't replace a SMoA adapter")
        if said := unlike(new, old, FIXED):
            raise ConfigError(f"{path}: has {said} as the loaded adapter; {REMEDY}")
        state = tensors_of(*read_adapter(path))
        for name, layer in layers.items():
            refuse_writing(*layer.factors(adapter_name))
            saved_name = names.get(name, name)
            A, B, *partition = keys = [f"{PREFIX}{saved_name}.{part}" for part in PARTS]
            if state.keys().isdisjoint(keys):  # it does nothing
                state[A], state[B] = map(torch.zeros_like, layer.factors(adapter_name))
                labels = layer.smoa_row_labels[adapter_name], layer.smoa_col_labels[adapter_name]
                state |= zip(partition, (*labels, layer.derived(adapter_name).block_scale), strict=True)
            elif A in state and B in state:
                state[A], state[B] = _padded(path, saved_name, layer, adapter_name, (state[A], state[B]), new)
        loaded = get_peft_model_state_dict(slot, adapter_name=adapter_name, save_embedding_layers=False)
        tables = () if new.modules_to_save else tuple(f"{PREFIX}{name}." for name in embeddings_of(base))
        swapped = {key: t for key, t in state.items() if key in loaded or is_own(key) or not key.startswith(tables)}
        ours, theirs = ({f"{key} {tuple(t.shape)}" for key, t in each.items()} for each in (loaded, swapped))
        if ours != theirs:  # what is missing would stay the old adapter's
            more, lacking = (sorted(names)[:3] or "nothing" for names in (theirs - ours, ours - theirs))
            raise AdapterFileError(f"{path}: has {more}, but not {lacking}, unlike {adapter_name!r}; {REMEDY}")
        with taking_over(old, new, places_loaded(slot, old, adapter_name)):
            set_peft_model_state_dict(slot, state, adapter_name=adapter_name)


def _padded(
    path: str | Path, name: str, layer: SmoaLayer, adapter: str, factors: tuple[Tensor, Tensor], config: SmoaConfig
) -> list[Tensor]:
    """The ranks of each block padded with zeros to those of the slot, and B multiplied by the ratio of the scales."""
    (A, B), place, shape = factors, f"{path}: {name}", (layer.out_features, layer.in_features)
    slot, ranks, count = layer.adapters[adapter].ranks, config.ranks_of(name, shape=shape), layer.matrix_count or 1
    if (A.shape, B.shape) != layer.saved_shapes(ranks)[:2]:
        raise AdapterFileError(f"{place} has factors {tuple(A.shape)}, {tuple(B.shape)} that don't fit the layer")
    if any(theirs > ours for theirs, ours in zip(ranks, slot, strict=True)):
        said = f"block ranks {list(ranks)}, more than the {list(slot)} of the loaded adapter"
        raise ConfigError(f"{place} has {said}; load the adapter of the largest rank first")
    if B.dtype not in FACTOR_DTYPES:
        raise AdapterFileError(f"{place} has factors in {B.dtype}, floating point expected")
    ratio = config.alpha_of(name, sum(ranks), shape) / sum(ranks) / layer.adapters[adapter].scaling
    dtype = torch.promote_types(B.dtype, layer.factors(adapter)[1].dtype)  # the file's may round what the slot can hold
    used = [own.start + rank for own, r in zip(slices(slot), ranks, strict=True) for rank in range(r)]
    wide_A = A.new_zeros(count, sum(slot), A.shape[1])
    wide_B = B.new_zeros(B.shape[0], count, sum(slot), dtype=dtype)
    wide_A[:, used] = A.view(count, -1, A.shape[1])
    wide_B[:, :, used] = B.view(B.shape[0], count, -1).to(dtype) * ratio
    return [wide_A.flatten(0, 1), wide_B.flatten(1)]
