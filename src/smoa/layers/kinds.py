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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config import Shape
from smoa.layers.distributed import gather
from smoa.layers.layer import SmoaLayer, in_autocast_dtype, is_instrumented
from smoa.layers.linear import Linear
from smoa.layers.merging import as_stored
from smoa.layers.quantized import QuantizedLinear
from smoa.maths.factors import Initialization
from smoa.maths.kernels.autograd import checkpointed, is_transformed
from smoa.maths.kernels.fused import computes_exactly


class ReadByModels(SmoaLayer):
    """A layer of whose base models read some attributes, as Whisper reads the strides of its convolutions."""

    read_by_models: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in type(self).read_by_models:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)


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

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Refuse tables that change while they are used."""
        if base.max_norm is None:
            return None
        return f"max_norm={base.max_norm} changes the table in every lookup, and ΔW is relative to it; set it to None"

    def _fill_factors(self, A: Tensor, B: Tensor, adapter_name: str, init: Initialization) -> None:
        super()._fill_factors(A, B, adapter_name, init)
        if init is True:  # variance K instead of K / 3n: LoRA's is 1 here, and a token uses n / K of the n columns
            A.mul_((3 * self.in_features) ** 0.5)

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`ΔW[x]` (…, embedding_dim) for int x, times `embed_scale` if the base layer has one."""
        gather(self, adapter_name)
        base: Any = self.get_base_layer()
        tokens = x.reshape(-1)
        update, weight = self.update(adapter_name), self.pristine_weight()
        rows = update.lookup(tokens, weight, base.padding_idx, base.scale_grad_by_freq)
        rows = rows * self.smoa_dropout[adapter_name](rows.new_ones(tokens.shape[0], 1))
        scale: Any = getattr(base, "embed_scale", 1.0)
        scale = scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale
        output: Tensor = rows * scale
        return output.view(*x.shape, self.in_features)


class Convolution(ReadByModels):
    """SMoA on a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with any stride, padding, dilation and number of groups.

    One active adapter is computed by one convolution with W + ΔW where that is exact: in float32 on a CPU, and in
    float64. Otherwise `conv(x, ΔW)` is added to the base layer's output.
    """

    read_by_models = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_channels, in_channels / groups · kernel)."""
        conv: Any = base
        return conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size)

    def _active_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Any:
        weight, device_type = self.stored_weight(), x.device.type
        exact = weight.dtype == x.dtype and convolves_exactly(device_type, x.dtype)
        dropped = self.training and any(isinstance(self.smoa_dropout[name], nn.Dropout) for name in active)
        plain = not torch.is_autocast_enabled(device_type) and not is_instrumented(self.base_layer)
        if len(active) == 1 and plain and exact and not dropped:
            gather(self, active[0])
            return self._convolved(x, as_stored(self.pristine_weight(), weight.shape, False), active[0])
        return super()._active_forward(x, active, *args, **kwargs)

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`conv(x, ΔW)`, without bias; in training, dropout acts on x."""
        gather(self, adapter_name)
        return self._convolved(self.smoa_dropout[adapter_name](in_autocast_dtype(x)), None, adapter_name)

    def _convolved(self, x: Tensor, weight: Tensor | None, adapter_name: str) -> Tensor:
        """`conv(x, W + ΔW) + b`, or `conv(x, ΔW)` without W, by the base's method. The backward forms ΔW again."""
        base: Any = self.get_base_layer()

        def convolved(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):  # it would round ΔW
                delta = self.get_delta_weight(adapter_name)
                kernel, bias = (delta, None) if weight is None else (weight + delta, base.bias)
                output: Tensor = base._conv_forward(x, kernel.to(x.dtype), bias)
            return output

        keeps = torch.compiler.is_compiling() or is_transformed(x, self.stored_weight())
        return convolved(x) if keeps else checkpointed(convolved, x)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch has no annotation here
def convolves_exactly(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a convolution keeps all bits of its kernel. Devices other than a CPU may round float32 to TF32.

    A compiled model keeps the answer of its first call.
    """
    return dtype == torch.float64 or (dtype == torch.float32 and device_type == "cpu" and computes_exactly("conv"))


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
