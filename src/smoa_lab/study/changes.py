"""How much a run changed the weights: norms, stable rank and intruder dimensions of ΔW over some of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from smoa.maths.analysis import update_size
from smoa_lab.inspect import adapted_layers, weights_and_updates

LAYERS = 18
"""So many layers are decomposed, spread evenly over the model: three SVDs each."""


def weight_changes(model: nn.Module, base: nn.Module) -> dict[str, Any] | None:
    """The mean and the maximum over layers of each figure of :class:`UpdateSize`; None where the run diverged.

    ΔW is the difference to ``base``, also for methods that take a part of W out when they start. The layers are the
    adapted ones or, where all weights were trained, all linear ones but the output layer.
    """
    layers = dict(base.named_modules())
    sizes = []
    for path, weight, update in _adapted(model) if isinstance(model, PeftModel) else _linear(model):
        layer: Any = layers[path]
        before = layer.weight.detach().to(weight.device).float()
        delta = (weight - before) + update
        if not delta.isfinite().all():
            return None
        sizes.append(asdict(update_size(before, delta)))
    return {"layers": len(sizes), **{name: _summary([size[name] for size in sizes]) for name in sizes[0]}}


def _adapted(model: PeftModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    layers = adapted_layers(model.get_base_model())
    for path, layer in _spread([(path, one) for path, one in layers if hasattr(one.get_base_layer(), "weight")]):
        yield from weights_and_updates(path, layer, model.active_adapter)


def _linear(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    linear = [(path, one) for path, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head]
    for path, layer in _spread(linear):
        yield path, layer.weight.detach().float(), torch.zeros((), device=layer.weight.device)


def _spread(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Up to ``LAYERS`` of the layers, evenly spread, the first and the last included."""
    if len(layers) <= LAYERS:
        return layers
    return [layers[round(number * (len(layers) - 1) / (LAYERS - 1))] for number in range(LAYERS)]


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "max": max(values)}
