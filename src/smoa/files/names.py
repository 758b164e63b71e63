"""Names in a saved adapter: the prefix, the kinds of tensors, and the layers that they belong to."""

from __future__ import annotations

from torch import nn

from smoa.layers.distributed import LABELS, plain_name
from smoa.layers.layer import SmoaLayer

PREFIX = "base_model.model."
"""Of every name in a saved adapter, and in a model that a PeftModel is around."""
FACTORS = ("smoa_A", "smoa_B")
PARTS = (*(f"{factor}.weight" for factor in FACTORS), *LABELS)
"""What every saved layer has, in the order A, B, row and column labels. Adapters saved by 0.2 also have `SCALE`."""


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, SmoaLayer]:
    """The layers that have the adapter, by their names in state dicts."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, SmoaLayer))
    return {plain_name(name): layer for name, layer in layers if adapter_name in layer.smoa_A}
