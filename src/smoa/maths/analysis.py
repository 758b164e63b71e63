r"""What an update does to a weight's spectrum: ranks of ΔW, and which of W's singular directions it touches.

With `W = U diag(σ) Vᵀ` (economy, σ descending) the energy of ΔW on input direction j is `‖ΔW v_j‖²`, on output
direction j `‖u_jᵀ ΔW‖²`. How far down the spectrum an update reaches is the mean of `j / q` under that energy,
q = min(m, n): an update along the leading directions has coverage near 0, one that touches all alike 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoa.errors import PartitionError


@dataclass(frozen=True)
class UpdateSpectrum:
    """Of one layer: singular values of W (q,) and of ΔW (q,), both descending, and the share of ΔW's energy on each of
    W's singular directions, input and output side, (q,) each. float64 on the CPU."""

    weight_values: Tensor
    update_values: Tensor
    input_energy: Tensor
    output_energy: Tensor

    @property
    def rank(self) -> int:
        """The numerical rank of ΔW."""
        return numerical_rank(self.update_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of ΔW's normalised singular values (Roy and Vetterli, 2007)."""
        return effective_rank(self.update_values)

    @property
    def coverage(self) -> float:
        """The mean of `j / q` under the energy on both sides; 0 for an update of zero."""
        energy = self.input_energy + self.output_energy
        total = energy.sum()
        place = torch.arange(len(energy), dtype=energy.dtype) / len(energy)
        return float(energy @ place / total) if total else 0.0


def update_spectrum(weight: Tensor, delta_weight: Tensor) -> UpdateSpectrum:
    """Decompose W and ΔW, both (out_features, in_features), in float32 or wider: two full SVDs.

    Raises:
        PartitionError: the two differ in shape.
    """
    if weight.shape != delta_weight.shape:
        raise PartitionError(
            f"ΔW of shape {tuple(delta_weight.shape)} is no update of a weight of shape {tuple(weight.shape)}"
        )
    W, delta = (one.detach().to(torch.promote_types(one.dtype, torch.float32)) for one in (weight, delta_weight))
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    sides = (delta @ Vh.T).square().sum(0), (U.T @ delta).square().sum(1)
    return UpdateSpectrum(
        weight_values=sigma.double().cpu(),
        update_values=torch.linalg.svdvals(delta).double().cpu(),
        input_energy=_shares(sides[0]),
        output_energy=_shares(sides[1]),
    )


def numerical_rank(singular_values: Tensor) -> int:
    """How many singular values stand above the rounding of float32."""
    if not len(singular_values) or not singular_values.max():
        return 0
    floor = singular_values.max() * len(singular_values) * torch.finfo(torch.float32).eps
    return int((singular_values > floor).sum())


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the normalised singular values: between 1 and their number, 0 where all are zero."""
    share = singular_values[singular_values > 0]
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def _shares(energy: Tensor) -> Tensor:
    energy = energy.double().cpu()
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
