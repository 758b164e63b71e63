"""Rows of ΔW, or of W + ΔW, by their numbers: what an adapted embedding looks up. No table is formed.

A row v of block k is `ΔW[v, J_k] = s_k·(b_v A_k) ⊙ M[v, J_k]`, where b_v is its row of B_k. Only the looked-up rows of
B and M are touched, and the backward needs nothing but the factors, the numbers and W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from smoa.maths.factors import Factors
from smoa.maths.kernels.autograd import Gradients
from smoa.maths.kernels.one_product import Effective


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
            return Effective(weight, factors, waits=False, numbers=x).whole()
        spread_A, rows_of_B = factors.spread_rows(factors.dtype, x)
        rows = rows_of_B @ spread_A
        return rows if factors.modulation == "none" else rows.mul_(F.embedding(x, weight))

    def plain(self, factors: Factors, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        spread_A, rows_of_B = factors.spread_rows(factors.dtype, x)
        rows = rows_of_B @ spread_A
        rows = rows if factors.modulation == "none" else rows * F.embedding(x, weight)
        if rows.requires_grad:
            rows.register_hook(lambda g: self._counted(g, x))
        return F.embedding(x, weight) + rows.to(weight.dtype) if self.adds_weight else rows

    def backward(self, factors: Factors, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> Gradients:
        with torch.enable_grad():
            A, B = (factor.detach().requires_grad_() for factor in (factors.A, factors.B))
            spread_A, rows_of_B = parts = replace(factors, A=A, B=B).spread_rows(factors.dtype, x)
        g = self._counted(g.to(spread_A.dtype), x)
        g = g if factors.modulation == "none" else g * F.embedding(x, weight)
        of_A, of_B = torch.autograd.grad(parts, (A, B), (rows_of_B.T @ g, g @ spread_A.T))
        return None, of_A, of_B

    def _counted(self, g: Tensor, x: Tensor) -> Tensor:
        if self.padding is not None:
            g = g.masked_fill((x == self.padding)[:, None], 0)
        if self.by_freq:
            _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
            g = g / counts[inverse][:, None]
        return g
