"""Operations with W + ΔW, or ΔW alone, as a matrix that is formed for each use and never kept: the kernel of a
convolution, or the rows of a table that an embedding looks up by their numbers.

A row v of block k is `ΔW[v, J_k] = s_k·(b_v A_k) ⊙ M[v, J_k]`, where b_v is its row of B_k. A lookup touches only the
looked-up rows of B and M, and its backward needs nothing but the factors, the numbers and W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smoa.kernels.autograd import Gradients
from smoa.kernels.factors import Factors
from smoa.kernels.one_product import Effective, delta_of, plain_effective


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
        with torch.enable_grad(), _OnlyRecorded(g.shape):
            x = x.detach().requires_grad_(needs_x)
            y = self.convolve(x, kernel, None)
        of_kernel, *of_x = torch.autograd.grad(y, (kernel, x) if needs_x else (kernel,), g)
        parts = _of_factors(factors, lambda own: own.spread(own.dtype), weight, of_kernel.flatten(1))
        return of_x[0] if needs_x else None, *parts

    def _kernel(self, factors: Factors, x: Tensor, weight: Tensor, plain: bool = False) -> Tensor:
        if not self.adds_weight:
            matrix = delta_of(factors, weight)()
        elif plain:
            matrix = plain_effective(factors, weight)
        else:
            matrix = Effective(weight, factors).whole()
        return matrix.view(self.shape).to(x.dtype)


class _OnlyRecorded(TorchDispatchMode):
    """Lets autograd record a convolution with this output's shape, but computes none: a backward reads x and the kernel
    alone."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape = shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            return args[0].new_empty(self.shape)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Lookup:
    """`ΔW[x]` in float32 or wider, or `(W + ΔW)[x]` in the dtype of W, for int x (tokens,): (tokens, in_features).

    Args:
        adds_weight: Whether W is added; the rows then have the bits of the merged table.
        padding: The row that gets no gradient, as `padding_idx` of an embedding.
        by_freq: Divide the gradient of a row by the number of its occurrences, as `scale_grad_by_freq` does.
    """

    adds_weight: bool = False
    padding: int | None = None
    by_freq: bool = False

    def forward(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.adds_weight:
            return Effective(weight, factors, numbers=x).whole()
        spread_A, rows_of_B = factors.spread_rows(factors.dtype, x)
        rows = rows_of_B @ spread_A
        return rows if factors.modulation == "none" else (rows * F.embedding(x, weight)).to(rows.dtype)

    def plain(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = replace(self, adds_weight=False).forward(factors, x, weight)
        if rows.requires_grad:
            rows.register_hook(lambda g: self._counted(g, x))
        return F.embedding(x, weight) + rows.to(weight.dtype) if self.adds_weight else rows

    def backward(self, factors: Factors, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        g = self._counted(g.to(factors.dtype), x)
        return None, *_of_factors(factors, lambda own: own.spread_rows(own.dtype, x), F.embedding(x, weight), g)

    def _counted(self, g: Tensor, x: Tensor) -> Tensor:
        if self.padding is not None:
            g = g.masked_fill((x == self.padding)[:, None], 0)
        if self.by_freq:
            _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
            g = g / counts[inverse][:, None]
        return g


def _of_factors(
    factors: Factors, spread: Callable[[Factors], tuple[Tensor, Tensor]], anchor: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, from the gradient g of ΔW or of rows of it, which `spread` gives the factors of."""
    with torch.enable_grad():
        A, B = (factor.detach().requires_grad_() for factor in (factors.A, factors.B))
        spread_A, spread_B = spread(factors.with_factors(A, B))
    g = g.to(spread_A.dtype)
    g = g if factors.modulation == "none" else (g * anchor).to(g.dtype)
    of_A, of_B = torch.autograd.grad((spread_A, spread_B), (A, B), (spread_B.T @ g, g @ spread_A.T))
    return of_A, of_B
