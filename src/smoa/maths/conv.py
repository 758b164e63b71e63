r"""Convolutions with ΔW or W + ΔW as the kernel, where W is (out_channels, in_channels / groups · kernel).

ΔW is formed for the forward, formed again for the backward, and not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels.operators import Gradients, is_transformed, recomputed
from smoa.maths.scale import ModulationKind
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
    route = _Convolved(update.modulation, geometry, with_base)
    if weight.requires_grad or torch.compiler.is_compiling() or is_transformed(x, weight):
        with torch.autocast(x.device.type, enabled=False):  # a compiler decides itself what to keep
            return route.forward(update.factors, x, weight, bias)
    return recomputed(route, update.factors, x, weight, bias)


@dataclass(frozen=True)
class _Convolved:
    """The route of a convolution."""

    modulation: ModulationKind
    geometry: Geometry
    with_base: bool

    def forward(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        delta = Update(factors, self.modulation).delta(weight)
        return self.geometry.convolve(x, self._kernel(delta, weight, x.dtype), bias)

    def plain(self, factors: Factors, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(factors, x, weight, None)

    def backward(self, factors: Factors, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        leaves = factors.A.detach().requires_grad_(), factors.B.detach().requires_grad_()
        with torch.enable_grad():
            delta = Update(replace(factors, A=leaves[0], B=leaves[1]), self.modulation).delta(weight)
        kernel = self._kernel(delta.detach(), weight, x.dtype)
        grad_x, grad_delta = self.geometry.gradients(g, x, kernel, [needs_x, True])
        grad_A, grad_B = torch.autograd.grad(delta, leaves, grad_delta.to(delta.dtype))
        return grad_x, grad_A, grad_B

    def _kernel(self, delta: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (delta + weight if self.with_base else delta).to(dtype)
