"""Chooses how `x ΔWᵀ` is computed: block by block, by batched products, or in one product with `x Wᵀ`.

The results are the same. The thresholds are of a CPU, measured (docs/experiment-log.md). Elsewhere an operation costs
more to start than to run, so what starts fewer is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from smoa.maths.blocks import Blocks

Kernels = Literal["auto", "loop", "batched", "shared", "fused", "apart"]
SMALL_BLOCK = 3 << 14
"""Entries of the largest blocks for which batched products are faster."""
FEW_PRODUCTS = 128
"""Products of a token with the blocks of W, for which it does not pay to form ΔW."""


def prefers_batched(blocks: Blocks, kernels: Kernels = "auto") -> bool:
    """Whether to multiply all blocks of one shape in one product, instead of one after the other."""
    if kernels in ("loop", "batched") or blocks.row_labels.device.type != "cpu":
        return kernels != "loop"
    entries = blocks.out_features * blocks.in_features // blocks.num_blocks**2
    return entries <= SMALL_BLOCK


def prefers_apart(
    num_blocks: int, is_contiguous: bool, device_type: str, tokens: int, kernels: Kernels = "auto"
) -> bool:
    """Whether to add `x ΔWᵀ` to `x Wᵀ` even where a product with W + ΔW is exact.

    To form W + ΔW takes passes over the weight, which pay only for many tokens.
    """
    if kernels in ("fused", "apart", "batched") or device_type != "cpu":
        return kernels not in ("fused", "loop")
    return tokens < num_blocks**2 * (8 if is_contiguous else 4)


def prefers_shared(ranks: Sequence[int], tokens: int, kernels: Kernels = "auto") -> bool:
    """Whether an adapter's tokens are multiplied by the blocks of W, once for each rank, instead of by those of ΔW."""
    if kernels in ("loop", "batched", "shared"):
        return kernels == "shared"
    return max(ranks) * tokens <= FEW_PRODUCTS
