"""Modulations: how the anchor M of `ΔW = s·(BA) ⊙ M` is made. One class for each kind."""

from __future__ import annotations

import math
import zlib
from typing import Literal, Protocol

import torch
from torch import Tensor

from smoa.maths.blocks import Blocks

ModulationKind = Literal["hadamard", "none", "noise"]
SAFE_RMS = 1e-15, 1e15
"""Where squares neither underflow nor overflow in float32."""


class Modulation(Protocol):
    """Makes the anchor M (out_features, in_features) from the pristine weight."""

    anchors: bool
    """Whether there is an M."""
    by_weight: bool
    """Whether M is W itself, so that `W + ΔW = W ⊙ (1 + s·BA)` can be formed in one pass."""

    def anchor(self, weight: Tensor, blocks: Blocks) -> Tensor | None:
        """M, or None without modulation."""


class Hadamard:
    """M = W, the paper's method."""

    anchors, by_weight = True, True

    def anchor(self, weight: Tensor, blocks: Blocks) -> Tensor | None:
        return weight


class Unmodulated:
    """No M: with contiguous blocks this is MELoRA, with one block LoRA."""

    anchors, by_weight = False, False

    def anchor(self, weight: Tensor, blocks: Blocks) -> Tensor | None:
        return None


class Noise:
    """M is Gaussian noise with W's Frobenius norm, an ablation that replaces W's own entries."""

    anchors, by_weight = True, False

    def anchor(self, weight: Tensor, blocks: Blocks) -> Tensor | None:
        """Draw M with a seed that is a hash of the labels, so that it is the same wherever the adapter is loaded."""
        seed = zlib.crc32(torch.cat([blocks.row_labels, blocks.col_labels]).cpu().numpy().tobytes())
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        return noise.mul_(rms_of(weight) / rms_of(noise)).to(weight.device, weight.dtype)


MODULATIONS: dict[ModulationKind, Modulation] = {"hadamard": Hadamard(), "none": Unmodulated(), "noise": Noise()}


def rms_of(weight: Tensor) -> float:
    """Root mean square of the entries, computed in float32 or wider, of a scaled copy where their squares leave it."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    size = float(torch.linalg.vector_norm(weight)) / math.sqrt(weight.numel())
    if SAFE_RMS[0] < size < SAFE_RMS[1]:
        return size
    peak = float(weight.abs().max())
    return peak * rms_of(weight / peak) if 0 < peak < math.inf else peak
