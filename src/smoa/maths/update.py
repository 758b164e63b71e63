r"""The update ΔW of one layer, the central object of the method:

    ΔW[I_k, J_k] = s_k·(B_k A_k) ⊙ M_k,   zero off the diagonal blocks   (arXiv:2605.21147)

M is the frozen weight W, or the anchor of another modulation. `delta` forms ΔW. `apply` computes `x ΔWᵀ` and
`apply_with_base` computes `x(W + ΔW)ᵀ + b`, both without forming ΔW. All three agree. Only `Factors` applies the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels import operators
from smoa.maths.kernels.block_runs import BlockRun
from smoa.maths.kernels.branch import delta_blocks
from smoa.maths.kernels.choice import prefers_batched
from smoa.maths.kernels.loops import product_dtype
from smoa.maths.kernels.plain import is_transformed, plain_branch, recomputed_branch
from smoa.maths.modulations import MODULATIONS, Modulation


@dataclass(frozen=True, eq=False)
class Update:
    """ΔW = s·(BA) ⊙ M of one layer."""

    factors: Factors
    modulation: Modulation = MODULATIONS["hadamard"]

    def anchor(self, weight: Tensor) -> Tensor | None:
        """M (out_features, in_features), made from the pristine weight; None without modulation."""
        return self.modulation.anchor(weight, self.factors.blocks)

    def delta(self, weight: Tensor) -> Tensor:
        """Dense ΔW (out_features, in_features), in the widest of float32 and the dtypes of `weight` and the factors.

        Args:
            weight: Pristine W (out_features, in_features).
        """
        wide = self.factors.wide(torch.promote_types(self.factors.dtype, weight.dtype))
        product = wide.spread_B() @ wide.spread_A()
        anchor = self.anchor(weight)
        if anchor is None:
            return product
        return product * anchor if is_transformed(anchor) else product.mul_(anchor)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x ΔWᵀ` for x (…, in_features) in the dtype of x; differentiable in x, A and B.

        Nothing of W's size is kept for the backward, unless W itself trains or a `torch.func` transform is active.
        """
        anchor = self.anchor(weight)
        if anchor is None or anchor.requires_grad or is_transformed(x, anchor):
            return plain_branch(self.factors, x, anchor)
        if torch.compiler.is_compiling() and prefers_batched(self.factors.blocks, x.shape[:-1].numel()):
            return recomputed_branch(self.factors, x, anchor)
        return operators.branch(self.factors, x, anchor)

    def apply_with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x(W + ΔW)ᵀ + b` in one product, for M = W; differentiable in x, A, B and bias.

        For float32 and float64 only: in 16 bits `W(1 + δ)` rounds a small δ away.
        """
        return operators.fused(self.factors, x, weight, bias)

    def kept_blocks(self, weight: Tensor, dtype: torch.dtype) -> list[tuple[BlockRun, Tensor]]:
        """The diagonal blocks of ΔW, (blocks, height, width) for each run of blocks of one shape, to be kept.

        They have the dtype in which `apply` multiplies x of `dtype`.

        Args:
            weight: Pristine W (out_features, in_features).
            dtype: Dtype of x.
        """
        anchor = self.anchor(weight)
        assert anchor is not None, "without an anchor, ΔW is applied as quickly from its factors"
        with torch.autocast(weight.device.type, enabled=False):  # it would round the factors
            return delta_blocks(self.factors, anchor, product_dtype(dtype, weight.device.type))

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of `apply` for x (None unless `needs_x`), A and B, given the gradient g of its output.

        For layers that dequantize the weight again for the backward.

        Args:
            g: (…, out_features).
            x: (…, in_features).
            weight: Pristine W (out_features, in_features).
            needs_x: Whether to compute the gradient for x.
        """
        anchor = self.anchor(weight)
        assert anchor is not None, "without an anchor, autograd computes the gradients"
        return operators.branch_gradients(self.factors, g, x, anchor, needs_x)
