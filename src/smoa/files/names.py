"""Names in a saved adapter: prefix, kinds of tensors, layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smoa.compat import BASE_PREFIX
from smoa.config import SmoaConfig
from smoa.layers.distributed import PARTITION, plain_name
from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import SmoaLayer, smoa_layers

PREFIX = BASE_PREFIX
"""Prefix of every name in a saved adapter, and of the base model's names inside a PeftModel."""
PARTS = ("smoa_A.weight", "smoa_B.weight", *PARTITION)
"""The tensors of every saved layer: A, B, row labels, column labels and block scales."""


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, SmoaLayer]:
    """The layers with the adapter, by their names in state dicts."""
    return {plain_name(name): layer for name, layer in smoa_layers(model).items() if adapter_name in layer.smoa_A}


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Names of the adapted parameters by those of their wrappers, which depend on how these are nested."""
    wrappers = {plain_name(name): each for name, each in model.named_modules() if isinstance(each, ParamWrapper)}
    return {name: f"{name.replace('.base_layer', '')}.{each.parameter_name}" for name, each in wrappers.items()}


def key_of(layer: str, part: str, adapter_name: str) -> str:
    """The key of a layer's tensor, one of `PARTS`, in a state dict."""
    name, dot, rest = part.partition(".")
    return f"{layer}.{name}.{adapter_name}{dot}{rest}"


def trained_biases(model: nn.Module, state: Mapping[str, Tensor], config: SmoaConfig, name: str) -> dict[str, Tensor]:
    """The biases that the adapter of this config and name trains."""
    if config.bias == "none":
        return {}
    biases = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] == "bias"}
    if config.bias == "all":
        saved, own = ".modules_to_save.", f".modules_to_save.{name}."
        return {key: tensor for key, tensor in biases.items() if saved not in key or own in key}
    of_layers = (f"{layer}.base_layer.bias" for layer in adapter_layers(model, name))
    return {key: biases[key] for key in of_layers if key in biases}


def embeddings_of(model: nn.Module) -> dict[str, Any]:
    """The model's input and output embeddings by name; none if transformers does not know them (speech models)."""
    embeddings: list[object] = []
    for getter in (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")):
        with suppress(NotImplementedError):
            embeddings += [getter()] if getter is not None else []
    return {name: module for name, module in model.named_modules() if any(module is each for each in embeddings)}


def new_tables(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors without tables of embeddings that the model has already, and with its names of the others.

    The names in a file depend on whether an adapter was on the embedding, perhaps another one. A table that is not new
    would overwrite a merged one or, where PEFT assigns it, part it from the layers tied to it.
    """
    if all(".smoa_" in key for key in state_dict):
        return dict(state_dict)
    embeddings = {
        plain_name(name).removeprefix(PREFIX): module
        for name, module in embeddings_of(model).items()
        if not isinstance(module, AuxiliaryTrainingWrapper)
    }
    result = {}
    for key, tensor in state_dict.items():
        bare = key.removeprefix(PREFIX)
        name = next((name for name in embeddings if bare.startswith(f"{name}.")), None)
        if name is not None and ".smoa_" not in bare:
            module, tail = embeddings[name], bare.removeprefix(f"{name}.").removeprefix("base_layer.")
            if tail == "weight" and _has_table(module, tensor):
                continue
            base = "base_layer." if isinstance(module, BaseTunerLayer) else ""
            key = f"{key.removesuffix(bare)}{name}.{base}{tail}"
        result[key] = tensor
    return result


def _has_table(module: Any, table: Tensor) -> bool:
    """Whether this is the weight of an embedding before any merge."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(base, "weight", None)
    if type(weight) is not nn.Parameter or weight.is_meta or (weight.shape, weight.dtype) != (table.shape, table.dtype):
        return False
    weight = module.unmerged(weight) if isinstance(module, SmoaLayer) else weight
    return torch.equal(weight, table.to(weight.device))
