"""SMoA on a convolution: W is (out_channels, in_channels / groups · kernel), one row for each output channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoa.config.adapter_config import Shape
from smoa.layers.adapted_layer import AdaptedLayer
from smoa.maths.convolution import Geometry, convolved


class Convolution(AdaptedLayer):
    """SMoA on a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with any stride, padding, dilation and number of groups.

    `conv(x, ΔW)` is added to the base layer's output.
    """

    read_by_models = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_channels, in_channels / groups · kernel)."""
        conv: Any = base
        return conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size)

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Refuse convolutions that do something else to their input or weight."""
        kind: Any = type(base)
        own: Any = next(parent for parent in kind.__mro__ if parent.__module__ == nn.Conv2d.__module__)
        if kind.forward is not own.forward or kind._conv_forward is not own._conv_forward:
            return f"it computes something else than {own.__name__}, to which ΔW would not apply"
        return None

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`conv(x, ΔW)`, without bias; in training, dropout acts on x."""
        self.gather(adapter_name)
        base: Any = self.get_base_layer()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.smoa_dropout[adapter_name](x)
        batched = x if x.dim() == len(base.kernel_size) + 2 else x[None]
        padding = _padding(base)
        if base.padding_mode != "zeros" or any(before != after for before, after in padding):
            sides = [size for pair in reversed(padding) for size in pair]
            batched = F.pad(batched, sides, "constant" if base.padding_mode == "zeros" else base.padding_mode)
            padding = [(0, 0)] * len(padding)
        geometry = Geometry(base.kernel_size, base.stride, tuple(p for p, _ in padding), base.dilation, base.groups)
        y = convolved(self.update(adapter_name), batched, self.pristine_weight(), geometry)
        return y if batched.dim() == x.dim() else y[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's own converter knows linear layers only. `smoa.export.lora.convert_to_lora` knows this one."""
        return False


def _padding(base: Any) -> list[tuple[int, int]]:
    """Entries that a convolution adds before and after each dimension of its input."""
    if base.padding == "valid":
        return [(0, 0)] * len(base.kernel_size)
    if base.padding == "same":
        totals = [d * (size - 1) for d, size in zip(base.dilation, base.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in base.padding]
