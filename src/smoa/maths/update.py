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
from torch.nn import functional as F

from smoa.maths.factors import Factors
from smoa.maths.kernels.autograd import checkpointed, is_transformed, recomputed
from smoa.maths.kernels.branch import Branch, plain_branch
from smoa.maths.kernels.fused import Fused
from smoa.maths.scale import ModulationKind, rank_scale


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
        wide, weight = self.factors.wide(torch.promote_types(self.factors.dtype, weight.dtype)), weight[rows]
        product = wide.spread_B()[rows] @ wide.spread_A()
        if self.modulation == "none":
            return product
        return product * weight if is_transformed(weight) else product.mul_(weight)

    def apply(self, x: Tensor, weight: Tensor | Callable[[], Tensor]) -> Tensor:
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

    def apply_with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x(W + ΔW)ᵀ + b` in one product, for M = W; differentiable in x, A, B and bias.

        For float32 and float64 only: in 16 bits `W(1 + δ)` rounds a small δ away.
        """
        y = recomputed(Fused(), self.factors, x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    def lookup(self, tokens: Tensor, weight: Tensor, padding: int | None = None, by_freq: bool = False) -> Tensor:
        """`ΔW[tokens]`, what an adapted embedding adds: (tokens, in_features), float32 or wider.

        A row v of block k is `ΔW[v, J_k] = s_k·(b_v A_k) ⊙ M[v, J_k]`, where b_v is its row of B_k. Touches the
        looked-up rows of B and M only, and autograd keeps nothing larger than the result.

        Args:
            tokens: int (tokens,), the rows to look up.
            weight: Pristine W (out_features, in_features), a row for each token.
            padding: The row that gets no gradient, as `padding_idx` of an embedding.
            by_freq: Divide the gradient of a row by the number of its occurrences, as `scale_grad_by_freq` does.
        """
        factors = self.factors
        with torch.autocast(weight.device.type, enabled=False):  # it would round the factors
            rows = (self._rows_of_B(tokens) * factors.scale(factors.dtype)) @ factors.spread_A().to(factors.dtype)
            rows = rows if self.modulation == "none" else rows * F.embedding(tokens, weight)
            if padding is not None:
                rows = torch.where((tokens == padding)[:, None], rows.detach(), rows)
            if by_freq and rows.requires_grad:
                _, inverse, counts = tokens.unique(return_inverse=True, return_counts=True)
                rows.register_hook(lambda gradient: gradient / counts[inverse][:, None])
            return rows

    def _rows_of_B(self, tokens: Tensor) -> Tensor:
        """The rows of B̃: (tokens, r), zero at the ranks of other blocks, without the scale."""
        factors, blocks = self.factors, self.factors.blocks
        block = blocks.row_labels[tokens].long()
        size, larger = divmod(blocks.out_features, blocks.num_blocks)
        first = block * size + block.clamp(max=larger)  # of the block, in the sorted order
        place = blocks.orders.rows_inverse[tokens] - first
        owner = rank_scale(torch.arange(blocks.num_blocks, device=tokens.device), factors.ranks)  # of each rank
        return F.embedding(place, factors.B).to(factors.dtype) * (block[:, None] == owner)
