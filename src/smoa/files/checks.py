"""Checks an adapter's tensors before they are loaded or saved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from itertools import product
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, MergeError, PartitionError, first_of, named
from smoa.files.base import check_base, held_layers
from smoa.files.loading import incoming, saved_config
from smoa.files.names import (
    COMPILED,
    PARTS,
    PREFIX,
    adapter_layers,
    embeddings_of,
    is_own,
    key_of,
    saved_names,
    split_tables,
    trained_biases,
    write_tables,
)
from smoa.layers.distributed import LABELS, SCALE, plain_name, refuse_writing, whole
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import as_labels, check_labels

FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_adapter_state(
    model: nn.Module,
    config: SmoaConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    tables: Sequence[tuple[SmoaLayer | nn.Module, Tensor]],
    layers: Mapping[str, SmoaLayer],
) -> None:
    """Check the tensors about to be loaded, keyed as in the model, and tables of embeddings, against the layers that
    have the adapter."""
    first = next((name for name, _ in model.named_parameters()), "")
    if not first.startswith(PREFIX) and plain_name(first).startswith(PREFIX):
        raise AdapterFileError(  # PEFT loads nothing into such a model, silently
            f"{first}: the model is wrapped, as by FSDP, and PEFT would load nothing into it; "
            "load the adapter before the model is wrapped, or into the wrapper's .module"
        )
    labels = [
        (state_dict.get(key_of(name, part, adapter_name)), shape)
        for name, layer in layers.items()
        for part, shape in zip(LABELS, layer.saved_shapes((1,))[2:4], strict=True)
    ]
    is_other = any(tensor is not None and tensor.shape[-1:] != shape[-1:] for tensor, shape in labels)
    base = f"the adapter was trained on another base, {config.base_model_name_or_path or 'of other sizes'}"
    hint = f"; {base if is_other else f'does {CONFIG_NAME} come from another save?'}" if incoming() else ""
    own = {key for key in state_dict if is_own(key)}
    keys_of = {name: [key_of(name, part, adapter_name) for part in PARTS] for name in layers}
    expected = {key for keys in keys_of.values() for key in keys}
    others = state_dict.keys() - own
    lost, foreign = _compare_others(model, config, adapter_name, others)
    differences = {"lacks": sorted(expected - own) + lost, "has unknown": sorted(own - expected) + foreign}
    problems = [f"{verb} {len(keys)} tensor(s): {first_of(keys)}" for verb, keys in differences.items() if keys]
    if problems:
        raise AdapterFileError("; ".join(f"the adapter file {problem}" for problem in problems) + hint)
    for key in state_dict:  # in the order of all ranks, which gather FSDP2's shards together
        if key in others and (tensor := whole(state_dict[key])).is_floating_point():
            _largest(key, tensor)
    for module, table in tables:
        _largest(f"the table of {type(module).__name__}", table)
        if isinstance(module, SmoaLayer) and module.merged:
            raise AdapterFileError("the file has new rows of a merged embedding; call unmerge_adapter first")
    for name, layer in layers.items():
        tensors = {key: whole(state_dict[key]) for key in keys_of[name]}
        ranks, scaling = layer.adapters[adapter_name].ranks, layer.scaling[adapter_name]
        stored = next(layer.smoa_A[adapter_name].parameters()).dtype
        check_layout(tensors, layer.saved_shapes(ranks), len(ranks), hint)
        check_values(name, tensors, ranks, scaling, stored)


def _compare_others(model: nn.Module, config: SmoaConfig, adapter: str, keys: Set[str]) -> tuple[list[str], list[str]]:
    """Missing keys, and foreign ones, which PyTorch would write over the base or silently drop.

    In addition to factors and labels, PEFT saves trained biases, modules_to_save and token embeddings (in wrappers,
    which check their own keys), and the embeddings of a resized vocabulary. A file may have biases that the config
    doesn't train: they are loaded, as in PEFT.
    """
    if not keys and config.bias == "none":
        return [], []
    state = model.state_dict()
    own = {key.removeprefix(PREFIX) for key in state}
    biases = {key.removeprefix(PREFIX) for key in trained_biases(model, state, config, adapter)}
    embeddings = embeddings_of(model)
    others = tuple(
        plain_name(name).removeprefix(PREFIX) + "."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or name in embeddings
    )
    given = {key.removeprefix(PREFIX) for key in keys}
    # PEFT saves resized embeddings of modules_to_save a second time, under a name that nothing reads. So did earlier
    # versions of smoa with biases of modules_to_save (bias="all").
    twice = re.compile(r"\.modules_to_save\.([^.]+\.)?(bias|weight)$")
    unread = {key for key in given if key.startswith(others) and twice.search(key) and twice.sub(r".\2", key) in given}
    known = {key for key in own if "bias" in key or key.startswith(others)} | unread
    return sorted(biases - given), sorted(given - known)


def check_layout(
    tensors: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]], num_blocks: int, hint: str = ""
) -> None:
    """Raise AdapterFileError if a tensor of a layer has a wrong shape or dtype, or is no partition. Tensors and shapes
    are in the order of `PARTS`; `hint` ends the message."""
    for part, shape, (key, tensor) in zip(PARTS, shapes, tensors.items(), strict=True):
        if tensor.shape != shape:
            raise AdapterFileError(f"{key}: shape {tuple(tensor.shape)} doesn't fit the layer, expected {shape}{hint}")
        if part in LABELS:
            try:
                for labels in [tensor] if tensor.ndim == 1 else tensor.flatten(0, -2):  # of each matrix of a stack
                    check_labels(labels, num_blocks, key)
            except PartitionError as error:
                raise AdapterFileError(f"{error}; the adapter was made for another layer or num_blocks{hint}") from None
        elif tensor.dtype not in FACTOR_DTYPES:
            raise AdapterFileError(f"{key}: {tensor.dtype} found, floating point expected{hint}")


def check_values(
    name: str, tensors: Mapping[str, Tensor], ranks: Sequence[int], scaling: float, stored: torch.dtype
) -> None:
    """Raise AdapterFileError if a factor or scale of a layer is not finite, or its ΔW would overflow with factors that
    are stored in this dtype."""
    largest = [
        _largest(key, tensor.to(torch.float32 if part == SCALE else stored))
        for part, (key, tensor) in zip(PARTS, tensors.items(), strict=True)
        if part not in LABELS
    ]
    # Finite values may make ΔW infinite, as a flipped bit of an exponent does. With none below 1, no part of a product
    # exceeds it, in whatever order it is taken.
    size = math.prod(max(value, 1.0) for value in (*largest, abs(scaling), max(ranks)))
    dtype = torch.promote_types(stored, torch.float32)
    if size > torch.finfo(dtype).max:
        raise AdapterFileError(
            f"{name}: the largest values of its factors and scale multiply to {size:.0e}, beyond {dtype}; "
            "its training diverged, or one is damaged and the adapter is to be fetched again"
        )


def _largest(key: str, tensor: Tensor) -> float:
    """The largest absolute value; raises AdapterFileError if one is NaN or infinite."""
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # norms don't support 8-bit formats
    largest = float(torch.linalg.vector_norm(wide, torch.inf)) if wide.numel() else 0.0
    if not math.isfinite(largest):
        raise AdapterFileError(f"{key}: holds NaN or infinite values; the adapter is broken")
    return largest


def refuse_merged(layers: Mapping[str, SmoaLayer], adapter_name: str) -> None:
    """Raise MergeError if the adapter is merged: its layers would compute with the old one until they are unmerged."""
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise MergeError(f"{merged[0]}: {adapter_name!r} is merged; call unmerge_adapter first")


def checked_tensors(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file by the model's names, checked, and with factors in the dtype of the model's; the tables of
    embeddings among them are written."""
    layers, names = adapter_layers(model, adapter_name), saved_names(model)
    refuse_merged(layers, adapter_name)
    keys = {f"{names.get(n, n)}.{part}": key_of(n, part, adapter_name) for n, part in product(layers, PARTS)}
    keys |= {PREFIX + saved.removeprefix(PREFIX): key for saved, key in keys.items()}  # a file may lack or have it
    renamed = {keys.get(key.replace(COMPILED, "."), key): tensor for key, tensor in state_dict.items()}
    remapped, tables = split_tables(model, renamed)
    for key in (key_of(name, part, adapter_name) for name, part in product(layers, LABELS)):
        if key in remapped:  # others' tools make all of a state dict float32
            remapped[key] = as_labels(remapped[key])
    file = incoming()
    with named(None if file is None else file.path):
        check_adapter_state(model, config, adapter_name, remapped, tables, layers)
        state = {key.removeprefix(PREFIX): tensor for key, tensor in model.state_dict().items()}
        bare = {key: key.removeprefix(PREFIX) for key in remapped if not is_own(key)}
        others = {key: state[name] for key, name in bare.items() if name in state}  # biases, modules_to_save
        for key, tensor in others.items() if file is not None and not file.skips else ():
            if tensor.is_floating_point() and tensor.shape != remapped[key].shape:  # 4-bit ones are packed
                shapes = f"shape {tuple(remapped[key].shape)}, not the model's {tuple(tensor.shape)}"
                remedy = "load it on such a model, or pass ignore_mismatched_sizes=True"
                raise AdapterFileError(f"{key}: {shapes}; {remedy}")
        _check_base(model, config, adapter_name, remapped, tables, layers)
    for name, layer in layers.items():
        refuse_writing(*layer.factors(adapter_name))
        layer.adapters[adapter_name].pending = False
        for part, factor in zip(PARTS, (layer.smoa_A, layer.smoa_B), strict=False):
            key, dtype = key_of(name, part, adapter_name), next(factor[adapter_name].parameters()).dtype
            remapped[key] = remapped[key].to(dtype)  # with low_cpu_mem_usage PEFT assigns them
    for key, tensor in others.items():
        remapped[key] = remapped[key].to(tensor.dtype)
    write_tables(tables)
    return remapped


def _check_base(
    model: nn.Module, config: Any, adapter: str, tensors: dict[str, Tensor], tables: Any, layers: dict[str, SmoaLayer]
) -> None:
    """`check_base`, by the config of the file that is being loaded, if there is one: its scale is the tensors' own."""
    file, name = incoming(), getattr(getattr(model, "config", None), "_name_or_path", None)
    saved = {} if file is None else saved_config(file.path.with_name(CONFIG_NAME))
    if saved.get("peft_type") == "SMOA":
        names = "scale", "modulation", "base_model_name_or_path", "quantized_base"
        known = {each: saved[each] for each in names if each in saved}
        config = SmoaConfig(**known, other_base=bool(saved.get("other_base")) or config.other_base)
    held = held_layers(layers, lambda layer: tuple(tensors[key_of(layer, part, adapter)] for part in PARTS), tables)
    check_base(held, config, name)
