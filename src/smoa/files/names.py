"""Names in a saved adapter: prefix, kinds of tensors, layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smoa.compat import PREFIX as PREFIX
from smoa.config import SmoaConfig
from smoa.layers.distributed import PARTITION, plain_name, writing
from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import SmoaLayer, smoa_layers

COMPILED = "._orig_mod."
"""What `torch.compile` adds to the names of what is in a module."""
_OWN = re.compile(r"\.smoa_(A|B|row_labels|col_labels|block_scale)(\.|$)")
_OF_PEFT = re.compile(r"\.(modules_to_save|trainable_tokens_\w+)\.")
"""Parts of a name after which PEFT puts an adapter's."""
PARTS = ("smoa_A.weight", "smoa_B.weight", *PARTITION)
"""The tensors of every saved layer: A, B, row labels, column labels and block scales."""


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, SmoaLayer]:
    """The layers with the adapter, by their names in state dicts."""
    return {plain_name(name): layer for name, layer in smoa_layers(model).items() if adapter_name in layer.smoa_A}


def saved_names(model: nn.Module) -> dict[str, str]:
    """Names of the adapted layers in a file by those in state dicts, where these differ: wrappers of parameters, whose
    names depend on how they are nested, and layers in a region that `torch.compile` wraps."""
    names = dict[str, str]()
    for name, layer in smoa_layers(model).items():
        name = plain_name(name)
        if isinstance(layer, ParamWrapper):
            names[name] = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        if COMPILED in name:
            names[name] = names.get(name, name).replace(COMPILED, ".")
    return names


def is_own(key: str) -> bool:
    """Whether a key is that of a factor, label or scale, and not of what PEFT has for an adapter whose name is like
    one."""
    own = _OWN.search(key)
    return own is not None and _OF_PEFT.search(key, 0, own.start() + 1) is None


def without_adapter(key: str, adapter_name: str) -> str:
    """The key of a model's tensor as it is saved: without the adapter's name, and what `torch.compile` adds."""
    own = rf"(\.smoa_\w+)\.{re.escape(adapter_name)}(?=\.|$)"
    return re.sub(own, r"\1", key, count=1).replace(COMPILED, ".")


def key_of(layer: str, part: str, adapter_name: str) -> str:
    """The key of a layer's tensor, one of `PARTS`, in a state dict."""
    name, dot, rest = part.partition(".")
    return f"{layer}.{name}.{adapter_name}{dot}{rest}"


def trained_biases(model: nn.Module, state: Mapping[str, Tensor], config: SmoaConfig, name: str) -> dict[str, Tensor]:
    """The biases that the adapter of this config and name trains."""
    if config.bias == "none":
        return {}
    named = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] == "bias"}
    # PEFT saves its own; and an adapter may be called bias
    biases = {key: tensor for key, tensor in named.items() if not (is_own(key) or _OF_PEFT.search(key))}
    if config.bias == "all":
        return biases
    of_layers = (f"{layer}.base_layer.bias" for layer in adapter_layers(model, name))
    return {key: biases[key] for key in of_layers if key in biases}


def places_loaded(model: nn.Module, config: SmoaConfig, name: str) -> list[tuple[dict[str, Any], str]]:
    """Where a load of the adapter of this config and name writes: dictionaries of modules and the keys there of its
    factors, labels, scales and copies, and of the biases that it trains."""
    places = {
        f"{path}.{key}".lstrip("."): (table, key)
        for path, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    }
    biases = trained_biases(model, {path: table[key] for path, (table, key) in places.items()}, config, name)
    known = (path for path in places if f".{name}." in f"{path}." and (is_own(path) or _OF_PEFT.search(path)))
    return [places[path] for path in {*known, *biases}]


def embeddings_of(model: nn.Module) -> dict[str, Any]:
    """The model's input and output embeddings by name; none if transformers does not know them (speech models)."""
    embeddings: list[object] = []
    for getter in (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")):
        with suppress(NotImplementedError):
            embeddings += [getter()] if getter is not None else []
    embeddings = [getattr(each, "_orig_mod", each) for each in embeddings]
    return {name: module for name, module in model.named_modules() if any(module is each for each in embeddings)}


def split_tables(
    model: nn.Module, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[Any, Tensor]]]:
    """The saved tensors by the model's names, without those tables of embeddings that its own can be compared with; and
    of these the new ones, each with the module of its embedding.

    The names in a file depend on whether an adapter was on the embedding, perhaps another one. PEFT might assign a
    table, and so part it from the layers tied to it, or write it over a merged one.
    """
    if all(map(is_own, state_dict)):
        return dict(state_dict), []
    embeddings = {
        plain_name(name).removeprefix(PREFIX): module
        for name, module in embeddings_of(model).items()
        if not isinstance(module, AuxiliaryTrainingWrapper)
    }
    known = {key.replace(COMPILED, "."): key for key in model.state_dict() if COMPILED in key}
    result, tables = dict[str, Tensor](), list[tuple[Any, Tensor]]()
    for key, tensor in state_dict.items():
        bare = key.removeprefix(PREFIX).replace(COMPILED, ".")
        name = next((name for name in embeddings if bare.startswith(f"{name.replace(COMPILED, '.')}.")), None)
        if name is not None and not is_own(bare):
            tail = bare.removeprefix(f"{name.replace(COMPILED, '.')}.").removeprefix("base_layer.")
            module = embeddings[name]
            own = _table(module) if tail == "weight" else None
            if own is not None and own.shape == tensor.shape:
                tables += [] if _are_equal(own, tensor) else [(module, tensor)]
                continue
            base = "base_layer." if isinstance(module, BaseTunerLayer) else ""
            key = f"{PREFIX if key.startswith(PREFIX) else ''}{name}.{base}{tail}"
        result[known.get(key, known.get(PREFIX + key, key))] = tensor
    return result, tables


def _table(module: Any) -> Tensor | None:
    """The weight of an embedding before any merge, if it is there."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(base, "weight", None)
    if type(weight) is not nn.Parameter or weight.is_meta:
        return None
    return module.unmerged(weight) if isinstance(module, SmoaLayer) else weight


def _are_equal(own: Tensor, saved: Tensor) -> bool:
    """Whether two tables are the same after both are rounded to the narrower of their dtypes."""
    narrow = min(own.dtype, saved.dtype, key=lambda dtype: (torch.finfo(dtype).bits, -torch.finfo(dtype).eps))
    return torch.equal(own.to(narrow), saved.to(own.device, narrow))


def write_tables(tables: list[tuple[Any, Tensor]]) -> None:
    """Write tables of embeddings in place and in the base's dtype, so that tied layers stay tied."""
    for module, table in tables:
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        with writing(base.weight):
            base.weight.copy_(table)
