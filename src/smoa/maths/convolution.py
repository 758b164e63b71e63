r"""Convolutions with ΔW as the kernel: `conv(x, ΔW)`, where W is (out_channels, in_channels / groups · kernel).

ΔW is formed for the forward, formed again for the backward, and not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smoa.maths.kernels.operators import is_transformed
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
        return matrix.view(len(matrix), -1, *self.kernel_size)

    def convolve(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`conv(x, matrix)` for x (batch, in_channels, …)."""
        none = [0] * len(self.stride)
        settings = self.stride, self.padding, self.dilation, False, none, self.groups
        return torch.convolution(x, self.kernel(matrix), None, *settings)

    def gradients(self, g: Tensor, x: Tensor, matrix: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Gradients of `convolve` for x and the matrix, each None unless needed, given the gradient g of its output."""
        none = [0] * len(self.stride)
        settings = self.stride, self.padding, self.dilation, False, none, self.groups
        kernel = self.kernel(matrix)
        grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(g, x, kernel, None, *settings, [*needs, False])
        return grad_x, grad_kernel.flatten(1)


def convolved(update: Update, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`conv(x, ΔW)` for x (batch, in_channels, …) in the dtype of x; differentiable in x, A and B.

    Args:
        update: The update of the kernel.
        x: The input, already padded unless `geometry` pads it with zeros.
        weight: Pristine W (out_channels, in_channels / groups · kernel).
        geometry: The convolution.
    """
    factors = update.factors
    with torch.autocast(x.device.type, enabled=False):
        plain = weight.requires_grad or torch.compiler.is_compiling() or is_transformed(x, factors.A, factors.B)
        if plain:  # a compiler decides itself what to keep
            return geometry.convolve(x, update.delta(weight).to(x.dtype))
        output: Tensor = _Branch.apply(x, factors.A, factors.B, update, weight, geometry)  # type: ignore[no-untyped-call]
        return output


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, update: Update, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, weight)
        ctx.update, ctx.geometry = update, geometry
        return geometry.convolve(x, update.delta(weight).to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight = ctx.saved_tensors
        leaves = A.detach().requires_grad_(), B.detach().requires_grad_()
        factors = replace(ctx.update.factors, A=leaves[0], B=leaves[1])
        with torch.enable_grad():
            delta = replace(ctx.update, factors=factors).delta(weight)
        needs = [ctx.needs_input_grad[0], True]
        grad_x, grad_delta = ctx.geometry.gradients(g, x, delta.detach().to(x.dtype), needs)
        grad_A, grad_B = torch.autograd.grad(delta, leaves, grad_delta.to(delta.dtype))
        return grad_x, grad_A, grad_B, None, None, None
