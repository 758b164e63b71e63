"""The kinds of layers that SMoA adapts: the one table from which targets are checked and adapted, and docs are made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from smoa.config.adapter_config import Shape
from smoa.layers.adapted_layer import AdaptedLayer
from smoa.layers.kinds.conv import Convolution
from smoa.layers.kinds.embedding import Embedding
from smoa.layers.kinds.linear import Linear
from smoa.layers.kinds.quantized import QuantizedLinear


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Args:
        base_class: Class of the base layer.
        name: Its name in errors and docs.
        layer_class: Class of the adapted layer.
        fan_in_fan_out: Whether the weight is stored as (in_features, out_features).
    """

    base_class: type[nn.Module]
    name: str
    layer_class: type[AdaptedLayer]
    fan_in_fan_out: bool = False

    def shape_of(self, base: nn.Module) -> Shape:
        """(out_features, in_features) of the matrix W that is adapted."""
        return self.layer_class.shape_of(base)


KINDS = (
    Kind(nn.Linear, "torch.nn.Linear", Linear),
    Kind(Conv1D, "transformers.pytorch_utils.Conv1D", Linear, fan_in_fan_out=True),
    Kind(nn.Embedding, "torch.nn.Embedding", Embedding),
    Kind(nn.Conv1d, "torch.nn.Conv1d", Convolution),
    Kind(nn.Conv2d, "torch.nn.Conv2d", Convolution),
    Kind(nn.Conv3d, "torch.nn.Conv3d", Convolution),
)
QUANTIZED = Kind(nn.Module, "linear layers quantized by bitsandbytes, torchao or HQQ", QuantizedLinear)
"""The kind of each layer whose weight PEFT can dequantize."""


def kind_of(base: nn.Module) -> Kind | None:
    """The kind of a base layer with a plain weight, None if SMoA can't adapt it."""
    return next((kind for kind in KINDS if isinstance(base, kind.base_class)), None)
