"""Chooses how an adapter's part of an output is computed; CONTRIBUTING.md draws the tree.

| route       | computes                     | in                        |
|-------------|------------------------------|---------------------------|
| one product | x(W + ΔW)ᵀ + b               | `smoa.kernels.one_product`|
| kept        | x · kept blocks of ΔW        | `smoa.kept`               |
| shared      | x ΔWᵀ, without forming ΔW    | `smoa.kernels.shared`     |
| blocks      | x ΔWᵀ, a piece at a time     | `smoa.kernels.blocks`     |
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.kept import open_snapshot
from smoa.kernels.autograd import is_transformed, only_values
from smoa.kernels.shared import prefers_shared

Route = Literal["one product", "kept", "shared", "blocks"]


def route_of(layer: Any, x: Tensor, adapter_name: str, alone: bool = False) -> Route:
    """The route of an adapter's part of a layer's output for the input x.

    Args:
        layer: The adapted layer.
        x: Its input.
        adapter_name: The adapter.
        alone: Whether no other adapter is active, so that W + ΔW may stand for W.
    """
    own = layer.adapters[adapter_name]
    values, has_blocks = only_values(x), layer.keeps_blocks and own.modulation != "none"
    if values and has_blocks and open_snapshot(layer, [adapter_name]) is not None:
        return "kept"
    if alone and layer.fits_one_product(x, adapter_name) and not layer.dropped(adapter_name):
        weight = layer.stored_weight()
        if not (weight.requires_grad or is_transformed(x, weight)):
            return "one product"
    if values and has_blocks and prefers_shared(max(own.ranks), x.shape[:-1].numel()):
        return "shared"
    return "blocks"


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x as autocast would have it, if it is on for the device of x; it never touches float64."""
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if casts else x


def casts_alike(x: Tensor, weight: Tensor) -> bool:
    """Whether a product takes x and the weight in one dtype, by autocast or as they are."""
    casts = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    return casts or x.dtype == weight.dtype


def is_instrumented(module: nn.Module) -> bool:
    """Whether a hook, also one of all modules, or a replaced forward (accelerate's) must see the base layer's call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or torch.nn.modules.module._has_any_global_hook() or any(hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose call nobody else sees or replaces, nor has its output."""
    return type(module) in (nn.Linear, Conv1D) and not is_instrumented(module)
