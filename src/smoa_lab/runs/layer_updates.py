"""The weight W and the update ΔW of every adapted layer of a model, whatever the PEFT method."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smoa.layers.layer import SmoaLayer


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers whose ΔW can be had, by their paths, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            yield path, module


@torch.no_grad()
def weights_and_updates(path: str, module: Any, adapter: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every matrix that the adapter changes in a layer: its name, W, dequantized if it is quantized, and ΔW, in
    float32. A layer has one, named as the layer, a convolution (out, in · kernel); experts have one for each expert or,
    with gate and up, two.

    Of other methods ΔW is what a merge adds to W, computed in float64: HiRA's ``get_delta_weight`` is the factor that W
    is multiplied with, and DoRA's leaves its magnitudes out.
    """
    if isinstance(module, SmoaLayer):
        for part, weight, update in module.parts(adapter):
            name = f"{path.replace('.base_layer', '')}.{part}" if part else path
            yield name, weight.float(), update.delta(weight).float()
        return
    merged = deepcopy(module).double()
    before = merged.get_base_layer().weight.clone()
    merged.merge(adapter_names=[adapter])
    yield path, before.flatten(1).float(), (merged.get_base_layer().weight - before).flatten(1).float()
