"""How much a run changed the weights: norms, stable rank and intruder dimensions of ΔW over some of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from smoa.maths.analysis import update_size
from smoa_lab.runs.layer_updates import adapted_layers, weight_and_update

LAYERS = 18
"""So many layers are decomposed, spread evenly over the model: three SVDs each."""


def weight_changes(model: nn.Module, load_base: Callable[[], nn.Module]) -> dict[str, Any] | None:
    """Of each figure of :class:`UpdateSize` the mean and the maximum over layers; None where the run diverged.

    The layers are the adapted ones or, where all weights were trained, all linear ones but the output layer; there ΔW
    is the difference to the base that ``load_base`` gives.
    """
    pairs = _adapter_updates(model) if isinstance(model, PeftModel) else _differences(model, load_base())
    sizes = []
    for weight, update in pairs:
        if not update.isfinite().all():
            return None
        sizes.append(asdict(update_size(weight, update)))
    return {"layers": len(sizes), **{name: _summary([size[name] for size in sizes]) for name in sizes[0]}}


def _adapter_updates(model: PeftModel) -> Iterator[tuple[Tensor, Tensor]]:
    for _, layer in _spread(list(adapted_layers(model.base_model))):
        yield weight_and_update(layer, model.active_adapter)


@torch.no_grad()
def _differences(model: nn.Module, base: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    before = dict(base.named_modules())
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    linear = [(path, one) for path, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head]
    for path, layer in _spread(linear):
        old: Any = before[path]
        weight = old.weight.to(layer.weight.device).float()
        yield weight, layer.weight.float() - weight


def _spread(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """At most ``LAYERS`` of them, the first and the last included."""
    if len(layers) <= LAYERS:
        return layers
    return [layers[round(number * (len(layers) - 1) / (LAYERS - 1))] for number in range(LAYERS)]


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "max": max(values)}
