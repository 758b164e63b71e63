"""A convolution with `W + ΔW` in one, or with ΔW apart. The kernel is formed for each use and never kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels.autograd import Gradients
from smoa.maths.kernels.one_product import Effective, delta_of, plain_effective


@dataclass(frozen=True)
class Convolution:
    """`conv(x, W + ΔW) + b`, or `conv(x, ΔW)`, of x (batch, in_channels, …) for W (out_channels, …) as a matrix.

    Args:
        convolve: Computes it from x, a kernel and a bias.
        shape: The kernel's.
        adds_weight: Whether W is added; the kernel then has the bits of a merged one.
    """

    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    shape: torch.Size
    adds_weight: bool

    def forward(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.convolve(x, self._kernel(factors, x, weight), bias)

    def plain(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.convolve(x, self._kernel(factors, x, weight, plain=True), bias)

    def backward(self, factors: Factors, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        kernel = self._kernel(factors, x, weight).requires_grad_()
        with torch.enable_grad():
            x = x.detach().requires_grad_(needs_x)
            y = self.convolve(x, kernel, None)
            A, B = (factor.detach().requires_grad_() for factor in (factors.A, factors.B))
            spread_A, spread_B = replace(factors, A=A, B=B).spread(factors.dtype)
            product = spread_B @ spread_A
        of_kernel, *of_x = torch.autograd.grad(y, (kernel, x) if needs_x else (kernel,), g)
        of_product = of_kernel.flatten(1).to(product.dtype)
        of_product = of_product if factors.modulation == "none" else of_product.mul_(weight)
        of_A, of_B = torch.autograd.grad(product, (A, B), of_product)
        return of_x[0] if needs_x else None, of_A, of_B

    def _kernel(self, factors: Factors, x: Tensor, weight: Tensor, plain: bool = False) -> Tensor:
        if not self.adds_weight:
            matrix = delta_of(factors, weight)()
        elif plain:
            matrix = plain_effective(factors, weight)
        else:
            matrix = Effective(weight, factors, waits=False).whole()
        return matrix.view(self.shape).to(x.dtype)
