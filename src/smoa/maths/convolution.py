r"""Convolutions with ΔW or W + ΔW as the kernel, where W is (out_channels, in_channels / groups · kernel).

ΔW is formed for the forward, formed again for the backward, and not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smoa.maths.kernels.plain import is_transformed, needs_plain_gradients, plain_gradients
from smoa.maths.update import Update


@dataclass(frozen=True)
class Geometry:
    """How a kernel is moved over an input. All but `groups` have an entry for each dimension of the kernel."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def kernel(self, matrix: Tensor) -> Tensor:
        """A matrix (out_channels, in_channels / groups · kernel) as a kernel."""
        return matrix.view(matrix.shape[0], -1, *self.kernel_size)

    def convolve(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """`conv(x, matrix) + bias` for x (batch, in_channels, …)."""
        return torch.convolution(x, self.kernel(matrix), bias, *self._settings)

    def gradients(self, g: Tensor, x: Tensor, matrix: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Gradients of `convolve` for x and the matrix, each None unless needed, given the gradient g of its output."""
        backward, kernel = torch.ops.aten.convolution_backward, self.kernel(matrix)
        grad_x, grad_kernel, _ = backward(g, x, kernel, None, *self._settings, [*needs, False])
        return grad_x, grad_kernel.flatten(1)

    @property
    def _settings(self) -> tuple[Any, ...]:
        """The settings that PyTorch's operators take; the last but one are of transposed convolutions."""
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch has no annotation here
def convolves_exactly(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a convolution keeps all bits of its kernel. Devices other than a CPU may round float32 to TF32.

    A compiled model keeps the answer of its first call.
    """
    if dtype == torch.float32 and device_type == "cpu":
        settings = getattr(torch.backends.mkldnn, "conv", None)  # since PyTorch 2.9
        return getattr(settings, "fp32_precision", "ieee") not in ("tf32", "bf16")
    return dtype == torch.float64


def convolved(
    update: Update, x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None, with_base: bool = False
) -> Tensor:
    """`conv(x, ΔW) + bias`, or `conv(x, W + ΔW) + bias`, in the dtype of x; differentiable in x, A, B and bias.

    Args:
        update: The update of the kernel.
        x: The input (batch, in_channels, …), already padded unless `geometry` pads it with zeros.
        weight: Pristine W (out_channels, in_channels / groups · kernel).
        geometry: The convolution.
        bias: (out_channels,).
        with_base: Add W to ΔW. Only where that is exact enough (`convolves_exactly`).
    """
    factors = update.factors
    with torch.autocast(x.device.type, enabled=False):
        plain = weight.requires_grad or torch.compiler.is_compiling() or is_transformed(x, weight)
        if plain:  # a compiler decides itself what to keep
            return _plain(x, bias, update, weight, geometry, with_base)
        output: Tensor = _Convolved.apply(  # type: ignore[no-untyped-call]  # torch has no types here
            x, factors.A, factors.B, bias, update, weight, geometry, with_base
        )
        return output


def _plain(
    x: Tensor, bias: Tensor | None, update: Update, weight: Tensor, geometry: Geometry, with_base: bool
) -> Tensor:
    return geometry.convolve(x, _kernel(update.delta(weight), weight, with_base).to(x.dtype), bias)


def _kernel(delta: Tensor, weight: Tensor, with_base: bool) -> Tensor:
    return delta + weight if with_base else delta


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        update: Update,
        weight: Tensor,
        geometry: Geometry,
        with_base: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, weight)
        ctx.update, ctx.geometry, ctx.with_base = update, geometry, with_base
        return _plain(x, bias, update, weight, geometry, with_base)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight = ctx.saved_tensors
        grad_bias = g.sum([0, *range(2, g.dim())]) if ctx.needs_input_grad[3] else None
        if needs_plain_gradients(g):
            update = replace(ctx.update, factors=replace(ctx.update.factors, A=A, B=B))
            forward = partial(_plain, x, None, update, weight, ctx.geometry, ctx.with_base)
            return *plain_gradients(forward, (x, A, B), ctx.needs_input_grad[:3], g), grad_bias, None, None, None, None
        leaves = A.detach().requires_grad_(), B.detach().requires_grad_()
        factors = replace(ctx.update.factors, A=leaves[0], B=leaves[1])
        with torch.enable_grad():
            delta = replace(ctx.update, factors=factors).delta(weight)
        kernel = _kernel(delta.detach(), weight, ctx.with_base).to(x.dtype)
        grad_x, grad_delta = ctx.geometry.gradients(g, x, kernel, [ctx.needs_input_grad[0], True])
        grad_A, grad_B = torch.autograd.grad(delta, leaves, grad_delta.to(delta.dtype))
        return grad_x, grad_A, grad_B, grad_bias, None, None, None, None
