"""Names in a saved adapter: prefix, kinds of tensors, and layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from smoa.compat import BASE_PREFIX
from smoa.layers.distributed import PARTITION, plain_name
from smoa.layers.experts.param_wrapper import ParamWrapper
from smoa.layers.layer import SmoaLayer

PREFIX = BASE_PREFIX
"""Prefix of every name in a saved adapter, and of the base model's names inside a PeftModel."""
FACTORS = ("smoa_A", "smoa_B")
PARTS = (*(f"{factor}.weight" for factor in FACTORS), *PARTITION)
"""The tensors of every saved layer: A, B, row labels, column labels and block scales."""


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, SmoaLayer]:
    """The layers with the adapter, by their names in state dicts."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, SmoaLayer))
    return {plain_name(name): layer for name, layer in layers if adapter_name in layer.smoa_A}


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Names of the adapted parameters by those of their wrappers, which depend on how these are nested."""
    wrappers = (
        (plain_name(name), module) for name, module in model.named_modules() if isinstance(module, ParamWrapper)
    )
    return {name: f"{name.replace('.base_layer', '')}.{module.parameter_name}" for name, module in wrappers}


def renamed(state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with other names of their layers."""
    parts = {key: key.partition(".smoa_") for key in state_dict}
    return {names.get(head, head) + dot + rest: state_dict[key] for key, (head, dot, rest) in parts.items()}
