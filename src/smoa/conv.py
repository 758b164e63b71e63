"""SMoA on a convolution, whose W is (out_channels, in_channels / groups · kernel): one row for each output channel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from smoa.config import Shape
from smoa.distributed import gather
from smoa.kernels import formed
from smoa.kernels.autograd import recomputed
from smoa.layer import SmoaLayer, of_base
from smoa.route import Route, casts_alike, in_autocast_dtype, is_instrumented


class Convolution(SmoaLayer):
    """SMoA on a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with any stride, padding, dilation and number of groups.

    One active adapter is computed by one convolution with W + ΔW. Otherwise `conv(x, ΔW)` is added to the base layer's
    output.
    """

    in_channels, out_channels, kernel_size = map(of_base, ("in_channels", "out_channels", "kernel_size"))
    stride, padding, dilation, groups = map(of_base, ("stride", "padding", "dilation", "groups"))

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_channels, in_channels / groups · kernel)."""
        conv: Any = base
        return conv.out_channels, conv.in_channels // conv.groups * math.prod(conv.kernel_size)

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """If x and W have one dtype, and the base layer's call does nothing but convolve."""
        convolves = type(self.base_layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not is_instrumented(self.base_layer)
        return convolves and casts_alike(x, self.stored_weight())

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
