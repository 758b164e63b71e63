"""Chooses how an adapted layer is computed: the kernels for `x ΔWᵀ`, and whether it is computed apart from `x Wᵀ`.

The results are the same. The thresholds are of a CPU, measured (docs/experiment-log.md). Elsewhere an operation costs
more to start than to run, so that what starts fewer is taken.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

from smoa.errors import ConfigError
from smoa.maths.blocks import Blocks

Kernels = Literal["auto", "loop", "batched"]
SMALL_BLOCK = 1 << 13
"""Entries of the largest blocks for which batched products are faster."""
SMALL_SLICE, FEW_TOKENS = 1 << 15, 128
"""Entries of the largest contiguous blocks for which they are faster, and the most tokens with which they are."""


def use_kernels(kernels: Kernels) -> None:
    """Choose how adapted layers compute `x ΔWᵀ`, for the whole process. The results are the same.

    Args:
        kernels: "loop" computes block by block, "batched" all blocks of one shape in one product. "auto", the default,
            takes the faster: batched products on a GPU and for small blocks, else loops. The environment variable
            `SMOA_KERNELS` sets what smoa starts with.

    Raises:
        ConfigError: `kernels` is none of these.
    """
    global _kernels
    if kernels not in get_args(Kernels):
        raise ConfigError(f"kernels is {kernels!r}; use one of {', '.join(map(repr, get_args(Kernels)))}")
    _kernels = kernels


def prefers_batched(blocks: Blocks, tokens: int) -> bool:
    """Whether to multiply all blocks of one shape in one product, instead of one after the other."""
    if _kernels != "auto" or blocks.row_labels.device.type != "cpu":
        return _kernels != "loop"
    entries = blocks.out_features * blocks.in_features // blocks.num_blocks**2
    return entries <= (SMALL_SLICE if blocks.is_contiguous and tokens <= FEW_TOKENS else SMALL_BLOCK)


def prefers_apart(blocks: Blocks, tokens: int) -> bool:
    """Whether to add `x ΔWᵀ` to `x Wᵀ` even where a product with W + ΔW is exact.

    To form W + ΔW takes passes over the weight, which pay only for many tokens.
    """
    if _kernels == "batched" or blocks.row_labels.device.type != "cpu":
        return _kernels != "loop"
    few = blocks.num_blocks**2 * (2 if blocks.is_contiguous else 1)
    return blocks.num_blocks >= 4 and tokens < few


_kernels: Kernels = "auto"
use_kernels(os.environ.get("SMOA_KERNELS", "auto"))  # type: ignore[arg-type]  # checked there
