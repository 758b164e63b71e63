r"""The update ΔW of one layer, the central object of the method:

    ΔW[I_k, J_k] = s_k·(B_k A_k) ⊙ M_k,   zero off the diagonal blocks   (arXiv:2605.21147)

M is the frozen weight W, or there is none. `delta` forms ΔW. `apply` computes `x ΔWᵀ`,
`apply_with_base` computes `x(W + ΔW)ᵀ + b` and `lookup` rows of ΔW, all without forming ΔW. All agree. Only `Factors`
applies the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels.autograd import checkpointed, is_transformed, recomputed
from smoa.maths.kernels.branch import Branch, plain_branch
from smoa.maths.kernels.lookup import Lookup
from smoa.maths.kernels.one_product import OneProduct, dense_delta, plain_product
from smoa.maths.scale import ModulationKind

Weight = Tensor | Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Update:
    """ΔW = s·(BA) ⊙ M of one layer.

    Args:
        factors: A, B, the scale and the blocks.
        modulation: "hadamard" for M = W, "none" without M.
    """

    factors: Factors
    modulation: ModulationKind = "hadamard"

    def delta(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Dense ΔW (out_features, in_features), in the widest of float32 and the dtypes of `weight` and the factors.

        Args:
            weight: Pristine W (out_features, in_features).
            rows: Which rows to form.
        """
        return dense_delta(self.factors, self.modulation, weight, rows)

    def apply(self, x: Tensor, weight: Weight) -> Tensor:
        """`x ΔWᵀ` for x (…, in_features) in the dtype of x; differentiable in x, A and B.

        Nothing of W's size is kept for the backward, unless W itself trains or a `torch.func` transform is active.

        Args:
            x: (…, in_features).
            weight: Pristine W (out_features, in_features), or a function that dequantizes it, for the backward again.
        """
        if self.modulation == "none":
            return plain_branch(self.factors, x, None)
        if callable(weight) and is_transformed(x):
            weight = weight()
        if not callable(weight):
            if weight.requires_grad or is_transformed(x, weight):
                return plain_branch(self.factors, x, weight)
            # A compiler fuses gathers, products with M, scales and casts. Without the checkpoint it would keep the
            # blocks (measured: docs/experiment-log.md).
            if torch.compiler.is_compiling():
                return checkpointed(plain_branch, self.factors, x, weight)
        y = recomputed(Branch(), self.factors, x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], self.factors.blocks.out_features)

    def apply_with_base(self, x: Tensor, weight: Weight, bias: Tensor | None, transposed: bool = False) -> Tensor:
        """`x(W + ΔW)ᵀ + b` in one product, for M = W; differentiable in x, A, B and bias.

        W + ΔW has the very bits that a merge writes, and is rounded to the dtype of x for the product.

        Args:
            x: (…, in_features).
            weight: As in `apply`, in the dtype of x, or in float32 under autocast.
            bias: (out_features,) in the dtype of x.
            transposed: Whether W is stored as (in_features, out_features).
        """
        if torch.compiler.is_compiling() and not callable(weight):
            return checkpointed(plain_product, self.factors, x, weight, bias)
        y = recomputed(OneProduct(transposed), self.factors, x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def lookup(
        self,
        tokens: Tensor,
        weight: Tensor,
        padding: int | None = None,
        by_freq: bool = False,
        adds_weight: bool = False,
    ) -> Tensor:
        """`ΔW[tokens]` or, with `adds_weight`, `(W + ΔW)[tokens]`: what an adapted embedding looks up.

        The former is float32 or wider; the latter has the dtype of W, and the bits of the merged table.

        Args:
            tokens: int (tokens,), the rows to look up.
            weight: Pristine W (out_features, in_features), a row for each token.
            padding: The row that gets no gradient, as `padding_idx` of an embedding.
            by_freq: Divide the gradient of a row by the number of its occurrences, as `scale_grad_by_freq` does.
            adds_weight: Whether to add W.
        """
        route = Lookup(self.modulation, adds_weight, padding, by_freq)
        if torch.compiler.is_compiling() or weight.requires_grad or is_transformed(tokens, weight):
            with torch.autocast(weight.device.type, enabled=False):  # it would round the factors
                return route.plain(self.factors, tokens, weight)
        return recomputed(route, self.factors, tokens, weight)
