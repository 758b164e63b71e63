r"""What an update takes from the weight: its anchor M, and the part c_k of each block's scale, `s_k = (α/r)·c_k`.

| kind  | c_k          | meaning                                                        |
|-------|--------------|----------------------------------------------------------------|
| paper | 1            | ΔW is relative to W, as in arXiv:2605.21147                    |
| layer | 1 / rms(M)   | the anchor of a layer has unit rms, so α means what it does in LoRA |
| block | 1 / rms(M_k) | the same for each diagonal block `M_k = M[I_k, J_k]`           |
| lora  | 4 / rms(M_k) | keeps LoRA's learning rate: see `FACTOR`                       |

M is the anchor: W itself, or nothing, whose entries count as 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks

ModulationKind = Literal["hadamard", "none"]
"""By M: "hadamard" is W, the paper's method. "none" has none: with contiguous blocks MELoRA, with one block LoRA."""
SAFE_RMS = 1e-15, 1e15
"""Where squares neither underflow nor overflow in float32."""


def rms_of(weight: Tensor) -> float:
    """Root mean square of the entries, computed in float32 or wider, of a scaled copy where their squares leave it."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    size = float(torch.linalg.vector_norm(weight)) / math.sqrt(weight.numel())
    if SAFE_RMS[0] < size < SAFE_RMS[1]:
        return size
    peak = float(weight.abs().max())
    return peak * rms_of(weight / peak) if 0 < peak < math.inf else peak


ScaleKind = Literal["paper", "layer", "block", "lora"]
DEFAULT_SCALE: ScaleKind = "lora"
FACTOR = 4.0
"""Measured (docs/experiment-log.md, "LoRA's rate on four pairs"). With blocks of unit rms and LoRA's α/r the best
learning rate was 2 to 5 times LoRA's: the first step's ΔW has the norm of LoRA's, but spreads it over many directions,
where LoRA's has few."""

SMALLEST = 1e-30
"""An anchor of a smaller rms counts as zero: the scale of one near the smallest float32 would be infinite."""
LARGEST = torch.finfo(torch.float32).max
"""The scale of an anchor of a larger rms, which only float64 can hold, would be zero."""

_SIZES: dict[ScaleKind, Callable[[Tensor, Blocks], list[float]]] = {
    "paper": lambda anchor, blocks: [1.0] * blocks.num_blocks,
    "layer": lambda anchor, blocks: [rms_of(anchor)] * blocks.num_blocks,
    "block": lambda anchor, blocks: [rms_of(entries) for entries in blocks.each_of(anchor)],
    "lora": lambda anchor, blocks: [rms_of(entries) / FACTOR for entries in blocks.each_of(anchor)],
}


def block_scale(kind: ScaleKind, anchor: Tensor | None, blocks: Blocks) -> Tensor:
    """c_k of every block, float32 (num_blocks,) on the CPU; 1 without an anchor, and where float32 can't hold it."""
    if anchor is None:
        return torch.ones(blocks.num_blocks, dtype=torch.float32)
    sizes = _SIZES[kind](anchor, blocks)
    return torch.tensor([1 / size if SMALLEST < size <= LARGEST else 1.0 for size in sizes], dtype=torch.float32)


def whole_scale(of_weight: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`s_k = (α/r)·c_k` in `dtype`, of c_k, which comes from the weight, and α/r: the one place where they meet."""
    return of_weight.to(dtype) * scaling


def rank_scale(block_scale: Tensor, ranks: Sequence[int]) -> Tensor:
    """c_k of the block that each rank belongs to, (…, r): each entry of `block_scale` (…, K) r_k times."""
    return block_scale[..., [block for block, rank in enumerate(ranks) for _ in range(rank)]]
