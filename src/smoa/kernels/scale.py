r"""What an update takes from the weight: its anchor M, and the part c_k of each block's scale, `s_k = (α/r)·c_k`.

| kind  | c_k          | meaning                                                        |
|-------|--------------|----------------------------------------------------------------|
| paper | 1            | ΔW is relative to W, as in arXiv:2605.21147                    |
| layer | 1 / rms(M)   | the anchor of a layer has unit rms, so α means what it does in LoRA |
| block | 1 / rms(M_k) | the same for each diagonal block `M_k = M[I_k, J_k]`           |
| lora  | 4 / rms(M_k) | keeps LoRA's learning rate: see `FACTORS`                      |

M is the anchor: W itself, or nothing, whose entries count as 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from smoa.partition import Blocks

ModulationKind = Literal["hadamard", "none"]
"""By M: "hadamard" is W, the paper's method. "none" has none: with contiguous blocks MELoRA, with one block LoRA."""


def rms_of(weight: Tensor) -> float:
    """Root mean square of the entries, summed in float64: on the CPU where a device has none, as Apple's GPUs."""
    weight = weight.detach() if weight.device.type in ("cpu", "cuda") else weight.detach().cpu()
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(weight.numel())


ScaleKind = Literal["paper", "layer", "block", "lora"]
DEFAULT_SCALE: ScaleKind = "lora"
FACTORS: dict[ScaleKind, float] = {"layer": 1.0, "block": 1.0, "lora": 4.0}
"""Measured (docs/decisions.md). With blocks of unit rms and LoRA's α/r the best
learning rate was 2 to 5 times LoRA's: the first step's ΔW has the norm of LoRA's, but spreads it over many directions,
where LoRA's has few."""
SMALLEST = 1e-30
"""An anchor of a smaller rms counts as zero: the scale of one near the smallest float32 would be infinite."""


def scale_of(kind: ScaleKind, anchor: Tensor) -> float:
    """c_k of a block, or of all of a layer's, whose entries these are."""
    size = rms_of(anchor) / FACTORS[kind]
    return 1 / size if SMALLEST < size < torch.finfo(torch.float32).max else 1.0


def block_scale(kind: ScaleKind, anchor: Tensor | None, blocks: Blocks) -> Tensor:
    """c_k of every block, float32 (num_blocks,) on the CPU; 1 without an anchor, and where float32 can't hold it."""
    if anchor is None or kind == "paper":
        return torch.ones(blocks.num_blocks, dtype=torch.float32)
    parts = [anchor] * blocks.num_blocks if kind == "layer" else blocks.of(anchor)
    return torch.tensor([scale_of(kind, entries) for entries in parts], dtype=torch.float32)


def whole_scale(of_weight: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`s_k = (α/r)·c_k` in `dtype`, of c_k, which comes from the weight, and α/r: the one place where they meet."""
    return as_dtype(of_weight, dtype) * scaling


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, in a tenth of the time where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def rank_scale(block_scale: Tensor, ranks: Sequence[int]) -> Tensor:
    """c_k of the block that each rank belongs to, (…, r): each entry of `block_scale` (…, K) r_k times."""
    return block_scale[..., [block for block, rank in enumerate(ranks) for _ in range(rank)]]
