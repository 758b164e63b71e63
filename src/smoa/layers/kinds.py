"""The kinds of layers that SMoA adapts: embeddings, convolutions, and the table of all.

Targets are checked and adapted by this table, and docs are made from it.

A lookup in an embedding adds the tokens' rows of ΔW, and forms no other: tables are as tall as the vocabulary, so a
training step makes nothing of a table's size. In a convolution W is (out_channels, in_channels / groups · kernel), one
row for each output channel.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config import Shape
from smoa.layers.distributed import gather
from smoa.layers.layer import SmoaLayer
from smoa.layers.linear import Linear
from smoa.layers.merging import UNDO
from smoa.layers.quantized import QuantizedLinear, find_backend
from smoa.layers.route import Route, casts_alike, in_autocast_dtype, is_instrumented
from smoa.maths.factors import Initialization
from smoa.maths.kernels import formed
from smoa.maths.kernels.autograd import recomputed

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


class ReadByModels(SmoaLayer):
    """A layer of whose base models read some attributes, as Whisper reads the strides of its convolutions."""

    read_by_models: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in type(self).read_by_models:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """Whether nobody else sees or replaces the base layer's call, and it has no trained tokens."""
        return self.base_layer is self.get_base_layer() and not is_instrumented(self.base_layer)


class Embedding(ReadByModels):
    """SMoA on a `torch.nn.Embedding`, whose table is W, or on a scaled one of transformers (`embed_scale`).

    Dropout drops tokens, not features: the input is a one-hot vector. `padding_idx` and `scale_grad_by_freq` act on the
    factors as they would on the table. With `sparse`, the factors' gradients are dense.
    """

    read_by_models = ("num_embeddings", "embedding_dim", "padding_idx")

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(num_embeddings, embedding_dim)."""
        return int(base.num_embeddings), int(base.embedding_dim)  # type: ignore[arg-type]

    def _fill_factors(self, A: Tensor, B: Tensor, adapter_name: str, init: Initialization) -> None:
        super()._fill_factors(A, B, adapter_name, init)
        if init is True:  # variance K instead of K / 3n: LoRA's is 1 here, and a token uses n / K of the n columns
            A.mul_((3 * self.in_features) ** 0.5)

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """As above, if there is M."""
        return self.adapters[adapter_name].modulation != "none" and super().fits_one_product(x, adapter_name)

    def in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """`(W + ΔW)[x]`, as below."""
        return self._scaled(self._rows(x, adapter_name, True), x)

    def branch_output(self, x: Tensor, adapter_name: str, route: Route | None = None) -> Tensor:
        """`ΔW[x]` (…, embedding_dim) for int x, times `embed_scale` if the base layer has one."""
        rows = self._rows(x, adapter_name)
        rows = rows * self.smoa_dropout[adapter_name](rows.new_ones(rows.shape[0], 1))
        return self._scaled(rows, x)

    def _rows(self, x: Tensor, adapter_name: str, adds_weight: bool = False) -> Tensor:
        gather(self, adapter_name)
        base: Any = self.get_base_layer()
        route = formed.Lookup(adds_weight, base.padding_idx, base.scale_grad_by_freq)
        return recomputed(route, self.update(adapter_name), x.reshape(-1), self.pristine_weight())

    def _scaled(self, rows: Tensor, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        scale: Any = getattr(base, "embed_scale", 1.0)
        scale = scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale
        output: Tensor = rows * scale
        return output.view(*x.shape, self.in_features)


class Convolution(ReadByModels):
    """SMoA on a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with any stride, padding, dilation and number of groups.

    One active adapter is computed by one convolution with W + ΔW on a CPU. Otherwise `conv(x, ΔW)` is added to the base
    layer's output.
    """

    read_by_models = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_channels, in_channels / groups · kernel)."""
        conv: Any = base
        return conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size)

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """As above, if x and W have one dtype."""
        return casts_alike(x, self.stored_weight()) and super().fits_one_product(x, adapter_name)

    def in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """`conv(x, W + ΔW) + b`."""
        return self._convolved(in_autocast_dtype(x), adapter_name, True)

    def branch_output(self, x: Tensor, adapter_name: str, route: Route | None = None) -> Tensor:
        """`conv(x, ΔW)`, without bias; in training, dropout acts on x."""
        return self._convolved(self.smoa_dropout[adapter_name](in_autocast_dtype(x)), adapter_name)

    def _convolved(self, x: Tensor, adapter_name: str, adds_weight: bool = False) -> Tensor:
        """`conv(x, W + ΔW) + b`, or `conv(x, ΔW)`, by the base's method."""
        gather(self, adapter_name)
        base: Any = self.get_base_layer()
        shape, weight, update = self.stored_weight().shape, self.pristine_weight(), self.update(adapter_name)
        bias = base.bias.to(x.dtype) if adds_weight and base.bias is not None else None
        batch = x if x.dim() == len(shape) else x.unsqueeze(0)
        route = formed.Convolution(base._conv_forward, shape, adds_weight)
        y = recomputed(route, update, batch, weight, bias)
        return y if batch is x else y.squeeze(0)


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

    def refusal(self, base: nn.Module) -> str | None:
        """Why such a base layer can't be adapted although its kind can, and what to do; None if it can.

        A forward that replaces the class's own in one layer (accelerate's offloading, Unsloth) is not looked at.
        """
        if self is QUANTIZED:
            return None
        if base._parameters.get("weight") is None:
            return (
                "its weight is not a parameter but computed from others (weight or spectral normalization, pruning), "
                f"so a merge would be lost; {UNDO} first"
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
        if getattr(base, "max_norm", None) is not None:  # of an embedding
            return (
                f"max_norm={base.max_norm} changes the table in every lookup, and ΔW is relative to it; set it to None"
            )
        return None


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


def kind_and_backend(base: nn.Module, model: nn.Module) -> tuple[Kind | None, QuantizationBackend | None]:
    """The kind of a base layer of a model and, if its weight is quantized, the backend that dequantizes it."""
    backend = find_backend(base, model, tuple(kind.base_class for kind in KINDS))
    return (kind_of(base) if backend is None else QUANTIZED), backend


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
