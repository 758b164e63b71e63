r"""The part of each block's scale that comes from the weight: `s_k = (α/r)·c_k`.

| kind  | c_k          | meaning                                                        |
|-------|--------------|----------------------------------------------------------------|
| paper | 1            | ΔW is relative to W, as in arXiv:2605.21147                    |
| layer | 1 / rms(W)   | the anchor of a layer has unit rms, so α means what it does in LoRA |
| block | 1 / rms(W_k) | the same for each diagonal block `W_k = W[I_k, J_k]`           |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks
from smoa.maths.modulations import rms_of

ScaleKind = Literal["paper", "layer", "block"]

_SIZES: dict[ScaleKind, Callable[[Tensor, Blocks], list[float]]] = {
    "paper": lambda weight, blocks: [1.0] * blocks.num_blocks,
    "layer": lambda weight, blocks: [rms_of(weight)] * blocks.num_blocks,
    "block": lambda weight, blocks: [rms_of(entries) for entries in blocks.of(weight)],
}


def block_scale(kind: ScaleKind, weight: Tensor, blocks: Blocks) -> Tensor:
    """c_k of every block, float32 (num_blocks,) on the CPU; 1 where the weight is all zero."""
    return torch.tensor([1 / size if size else 1.0 for size in _SIZES[kind](weight, blocks)])


def rank_scale(block_scale: Tensor, ranks: Sequence[int]) -> Tensor:
    """c_k of the block that each rank belongs to, (r,): each entry of `block_scale` r_k times."""
    repeats = torch.tensor(ranks, device=block_scale.device)
    return torch.repeat_interleave(block_scale, repeats, output_size=sum(ranks))
