"""SMoA on a convolution: W is (out_channels, in_channels / groups · kernel), one row for each output channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoa.config import Shape
from smoa.layers.layer import SmoaLayer, in_autocast_dtype, is_instrumented
from smoa.maths.conv import Geometry, convolved, convolves_exactly


class Convolution(SmoaLayer):
    """SMoA on a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with any stride, padding, dilation and number of groups.

    One active adapter is computed by one convolution with W + ΔW where that is exact: in float32 on a CPU, and in
    float64. Otherwise `conv(x, ΔW)` is added to the base layer's output. `route="apart"` always does the latter.
    """

    converted_by_peft = False
    read_by_models = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_channels, in_channels / groups · kernel)."""
        conv: Any = base
        return conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size)

    def _active_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Any:
        if len(active) == 1 and self._can_fuse(x, active[0]):
            return self._convolved(x, active[0], self.bias, with_base=True)
        return super()._active_forward(x, active, *args, **kwargs)

    def _can_fuse(self, x: Tensor, adapter_name: str) -> bool:
        weight, device_type = self.stored_weight(), x.device.type
        exact = weight.dtype == x.dtype and convolves_exactly(device_type, x.dtype)
        frozen = not weight.requires_grad and not is_instrumented(self.base_layer)
        dropped = self.training and isinstance(self.smoa_dropout[adapter_name], nn.Dropout)
        return self.route != "apart" and exact and frozen and not dropped and not torch.is_autocast_enabled(device_type)

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`conv(x, ΔW)`, without bias; in training, dropout acts on x."""
        return self._convolved(self.smoa_dropout[adapter_name](in_autocast_dtype(x)), adapter_name)

    def _convolved(self, x: Tensor, adapter_name: str, bias: Tensor | None = None, with_base: bool = False) -> Tensor:
        self.gather(adapter_name)
        base: Any = self.get_base_layer()
        batched = x if x.dim() == len(base.kernel_size) + 2 else x[None]
        padding = _padding(base)
        if base.padding_mode != "zeros" or any(before != after for before, after in padding):
            sides = [size for pair in reversed(padding) for size in pair]
            batched = F.pad(batched, sides, "constant" if base.padding_mode == "zeros" else base.padding_mode)
            padding = [(0, 0)] * len(padding)
        geometry = Geometry(base.kernel_size, base.stride, tuple(p for p, _ in padding), base.dilation, base.groups)
        y = convolved(self.update(adapter_name), batched, self.pristine_weight(), geometry, bias, with_base)
        return y if batched.dim() == x.dim() else y[0]


def _padding(base: Any) -> list[tuple[int, int]]:
    """Entries that a convolution adds before and after each dimension of its input."""
    if base.padding == "valid":
        return [(0, 0)] * len(base.kernel_size)
    if base.padding == "same":
        totals = [d * (size - 1) for d, size in zip(base.dilation, base.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in base.padding]
