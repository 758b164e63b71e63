"""Checks an adapter's tensors before they are loaded or saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smoa.compat import trained_biases
from smoa.config.adapter_config import SmoaConfig
from smoa.errors import AdapterFileError, PartitionError
from smoa.files.loading import incoming
from smoa.files.names import FACTORS, PREFIX, adapter_layers
from smoa.layers.distributed import LABELS, PARTITION, SCALE, is_distributed, plain_name, whole, with_plain_names
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import check_labels

FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_adapter_state(model: nn.Module, config: SmoaConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Check the tensors about to be loaded, keyed as in the model, against the layers that have the adapter.

    Raises:
        AdapterFileError: a tensor is missing, unknown, not finite or has a wrong shape or dtype, labels are not a
            partition of their layer, a tensor would replace one that is not the adapter's, or FSDP wraps the model.
    """
    _refuse_wrapped(model)
    try:
        _check_state(model, config, adapter_name, state_dict)
    except AdapterFileError as error:
        found = incoming()
        if found is None:
            raise
        raise AdapterFileError(f"{found.file.path}: {error}; does {CONFIG_NAME} come from another save?") from None


def embeddings_of(model: nn.Module) -> dict[str, Any]:
    """The model's input and output embeddings by name; none if transformers does not know them (speech models)."""
    found: list[object] = []
    for getter in (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")):
        with suppress(NotImplementedError):
            found += [getter()] if getter is not None else []
    return {name: module for name, module in model.named_modules() if any(module is one for one in found)}


def check_gathered(state_dict: dict[str, Tensor]) -> None:
    """Refuse to save tensors that ZeRO-3 has left empty. Only rank 0 saves, so others are not checked.

    Raises:
        AdapterFileError: a tensor of rank 0 is empty.
    """
    empty = sorted(key for key, tensor in state_dict.items() if tensor.numel() == 0)
    if empty and not (is_distributed() and dist.get_rank() > 0):
        raise AdapterFileError(
            f"{empty[0]}: is empty, as are {len(empty) - 1} others: DeepSpeed ZeRO-3 has partitioned these weights; "
            "gather them on every rank: save_pretrained(folder, state_dict=accelerator.get_state_dict(engine))"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model whose parameters lack the prefix that its state dict has: PEFT then loads nothing, silently."""
    names = [name for name, _ in model.named_parameters()]
    if any(plain_name(name).startswith(PREFIX) for name in names) and not any(n.startswith(PREFIX) for n in names):
        raise AdapterFileError(
            f"{names[0]}: the model is wrapped, as by FSDP, and PEFT would load nothing into it; "
            "load the adapter before the model is wrapped, or into the wrapper's .module"
        )


def _check_state(model: nn.Module, config: SmoaConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    expected = dict(_expected_tensors(model, adapter_name))
    found = {key for key in state_dict if ".smoa_" in key}
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    lost, foreign = _compare_others(model, config, state_dict.keys() - found)
    if missing or extra or lost or foreign:
        differences = [_difference("lacks", missing + lost), _difference("has unknown", extra + foreign)]
        raise AdapterFileError("; ".join(filter(None, differences)))
    for key, tensor in state_dict.items():
        tensor = whole(tensor)  # FSDP2's checkpoints come in shards
        if key in expected:
            _check_tensor(key, tensor, *expected[key], adapter_name)
        else:
            _check_finite(key, tensor)
    for name, layer in adapter_layers(model, adapter_name).items():
        _check_product(name, layer, adapter_name, state_dict)


def _check_product(name: str, layer: SmoaLayer, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse finite values that may make ΔW infinite, as a flipped bit of an exponent does."""
    keys = (*(f"{name}.{factor}.{adapter_name}.weight" for factor in FACTORS), f"{name}.{SCALE}.{adapter_name}")
    largest = [float(whole(state_dict[key]).abs().max()) for key in keys]
    size = math.prod([*largest, abs(layer.scaling[adapter_name]), max(layer.ranks[adapter_name])])
    dtype = torch.promote_types(next(layer.smoa_A[adapter_name].parameters()).dtype, torch.float32)
    if size > torch.finfo(dtype).max:
        raise AdapterFileError(
            f"{name}: the largest values of its factors and scale multiply to {size:.0e}, beyond {dtype}; "
            "one is damaged, fetch the adapter again"
        )


def _compare_others(model: nn.Module, config: SmoaConfig, keys: Set[str]) -> tuple[list[str], list[str]]:
    """Missing keys, and foreign ones, which PyTorch would write over the base or silently drop.

    In addition to factors and labels, PEFT saves trained biases, modules_to_save and token embeddings (in wrappers,
    which check their own keys), and the embeddings of a resized vocabulary. A file may have biases that the config
    doesn't train: they are loaded, as in PEFT.
    """
    state = model.state_dict()
    own = {key.removeprefix(PREFIX) for key in state}
    trained = trained_biases(with_plain_names(model), state, config)
    biases = {key.removeprefix(PREFIX) for key in trained if ".modules_to_save." not in key}
    embeddings = embeddings_of(model)
    others = tuple(
        plain_name(name).removeprefix(PREFIX) + "."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or name in embeddings
    )
    found = {key.removeprefix(PREFIX) for key in keys}
    # With bias="all" PEFT saves the biases of modules_to_save a second time, under a name that nothing reads.
    unread = {key for key in found if key.startswith(others) and key.endswith(".modules_to_save.bias")}
    known = {key for key in own if key.endswith(".bias") or key.startswith(others)} | unread
    return sorted(biases - found), sorted(found - known)


def _expected_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, tuple[SmoaLayer, str]]]:
    for module_name, layer in adapter_layers(model, adapter_name).items():
        for name in FACTORS:
            yield f"{module_name}.{name}.{adapter_name}.weight", (layer, name)
        for name in PARTITION:
            yield f"{module_name}.{name}.{adapter_name}", (layer, name)


def _difference(verb: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"the adapter file {verb} {len(keys)} tensor(s): {', '.join(keys[:3])}{more}"


def _check_tensor(key: str, tensor: Tensor, layer: SmoaLayer, name: str, adapter_name: str) -> None:
    ranks = layer.ranks[adapter_name]
    shapes = dict(zip((*FACTORS, *PARTITION), layer.saved_shapes(adapter_name), strict=True))
    if tensor.shape != shapes[name]:
        raise AdapterFileError(f"{key}: shape {tuple(tensor.shape)} doesn't fit the layer, expected {shapes[name]}")
    if name in LABELS:
        try:
            for labels in tensor.reshape(-1, tensor.shape[-1]):  # of each matrix of a stack
                check_labels(labels, len(ranks), key)
        except PartitionError as error:
            raise AdapterFileError(f"{error}; the adapter was made for another layer or num_blocks") from None
        return
    if tensor.dtype not in FACTOR_DTYPES:
        raise AdapterFileError(f"{key}: {tensor.dtype} found, floating point expected")
    dtype = torch.float32 if name == SCALE else next(layer.smoa_A[adapter_name].parameters()).dtype
    _check_finite(key, tensor.to(dtype))


def _check_finite(key: str, tensor: Tensor) -> None:
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # isfinite does not support all 8-bit formats
    if tensor.is_floating_point() and not torch.isfinite(wide).all():
        raise AdapterFileError(f"{key}: holds NaN or infinite values; the adapter is broken")
