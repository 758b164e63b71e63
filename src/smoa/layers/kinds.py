"""The kinds of layers that SMoA adapts: the one table from which targets are checked and adapted, and docs are made."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config import Shape
from smoa.layers.conv import Convolution
from smoa.layers.embedding import Embedding
from smoa.layers.layer import SmoaLayer
from smoa.layers.linear import Linear
from smoa.layers.quantized import QuantizedLinear


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Args:
        base_class: Class of the base layer.
        name: Its name in errors and docs.
        layer_class: Class of the adapted layer.
        fan_in_fan_out: Whether the weight is stored as (in_features, out_features).
        alike: Names of subclasses whose own forward computes the same.
    """

    base_class: type[nn.Module]
    name: str
    layer_class: type[SmoaLayer]
    fan_in_fan_out: bool = False
    alike: tuple[str, ...] = ()

    def shape_of(self, base: nn.Module) -> Shape:
        """(out_features, in_features) of the matrix W that is adapted."""
        return self.layer_class.shape_of(base)

    def refusal(self, base: nn.Module) -> str | None:
        """Why such a base layer can't be adapted although its kind can, and what to do; None if it can.

        A forward that replaces the class's own in one layer (accelerate's offloading, Unsloth) is not looked at.
        """
        if self is QUANTIZED:
            return None
        if base._parameters.get("weight") is None:
            return (
                "its weight is not a parameter but computed from others (weight or spectral normalization, pruning), "
                "so a merge would be lost; undo that first, as with torch.nn.utils.parametrize.remove_parametrizations"
            )
        methods = [name for name in ("forward", "_conv_forward") if hasattr(self.base_class, name)]
        owners = {next(owner for owner in type(base).__mro__ if name in vars(owner)) for name in methods}
        for owner in owners - {self.base_class}:
            known = any(fnmatch(owner.__name__, pattern) for pattern in self.alike)
            plain = base._parameters.keys() <= {"weight", "bias"}  # T5Gemma 2 scales and replaces a row
            if not (plain and (known or (self.base_class is nn.Linear and _is_linear(base)))):
                return (
                    f"{owner.__name__} has a forward of its own, so it computes something else than "
                    f"{self.base_class.__name__}, to which ΔW would not apply"
                )
        return self.layer_class.refusal(base)


KINDS = (
    Kind(nn.Linear, "torch.nn.Linear", Linear, alike=("Float8Linear",)),
    Kind(Conv1D, "transformers.pytorch_utils.Conv1D", Linear, fan_in_fan_out=True),
    Kind(nn.Embedding, "torch.nn.Embedding", Embedding, alike=("*ScaledWordEmbedding",)),
    Kind(nn.Conv1d, "torch.nn.Conv1d", Convolution),
    Kind(nn.Conv2d, "torch.nn.Conv2d", Convolution),
    Kind(nn.Conv3d, "torch.nn.Conv3d", Convolution),
)
QUANTIZED = Kind(nn.Module, "linear layers quantized by bitsandbytes, torchao or HQQ", QuantizedLinear)
"""The kind of each layer whose weight PEFT can dequantize."""


def kind_of(base: nn.Module) -> Kind | None:
    """The kind of a base layer with a plain weight, None if SMoA can't adapt it."""
    return next((kind for kind in KINDS if isinstance(base, kind.base_class)), None)


def _is_linear(base: nn.Module) -> bool:
    """Whether a subclass's own forward computes `x Wᵀ + b`, as one that only calls `super()` does: it is tried."""
    shape, generator = Linear.shape_of(base), torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, shape[1], generator=generator), torch.randn(shape, generator=generator)
    bias = None if base._parameters.get("bias") is None else torch.randn(shape[0], generator=generator)
    trial = copy.copy(base)  # with weights that are here, wherever the layer's own are
    parameters = {"weight": weight, "bias": bias}
    trial._parameters = {name: None if value is None else nn.Parameter(value) for name, value in parameters.items()}
    try:
        with torch.no_grad():
            output = type(base).forward(trial, x)
    except Exception:
        return False
    expected = nn.functional.linear(x, weight, bias)
    return (
        isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, 1e-4, 1e-4)
    )
