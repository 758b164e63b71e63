r"""Measures an update's spectrum: its rank, and which singular directions of W it changes.

With `W = U diag(σ) Vᵀ` (economy, σ descending) the energy of ΔW on input direction j is `‖ΔW v_j‖²`, and on output
direction j `‖u_jᵀ ΔW‖²`. Coverage is the mean of `j / q` under that energy, q = min(m, n). It is near 0 if the update
acts on the leading directions only, and 0.5 if it acts on all directions alike. A block's coverage is that of its part
of ΔW, with the rest of ΔW taken as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoa.errors import PartitionError
from smoa.maths.blocks import Blocks
from smoa.maths.spectrum import decomposable


@dataclass(frozen=True)
class UpdateSpectrum:
    """Spectra of one layer, float64 on the CPU, of shape (q,) unless another is given.

    Args:
        weight_values: Singular values of W, descending.
        update_values: Singular values of ΔW, descending.
        input_energy: Share of ΔW's energy on each right singular vector of W.
        output_energy: Share of ΔW's energy on each left singular vector of W.
        block_energy: Energy of each block's part of ΔW on W's singular vectors, both sides together, (num_blocks, q);
            None where ΔW has no blocks.
    """

    weight_values: Tensor
    update_values: Tensor
    input_energy: Tensor
    output_energy: Tensor
    block_energy: Tensor | None = None

    @property
    def rank(self) -> int:
        """Numerical rank of ΔW: how many singular values are above σ_max·q·ε, with ε of float32."""
        floor = self.update_values[0] * len(self.update_values) * torch.finfo(torch.float32).eps
        return int((self.update_values > floor).sum())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of ΔW's normalized singular values, from 1 to q (Roy and Vetterli, 2007); 0 if ΔW is
        zero."""
        share = self.update_values[self.update_values > 0]
        share = share / share.sum()
        return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0

    @property
    def relative_update(self) -> float:
        """‖ΔW‖_F / ‖W‖_F."""
        return float(self.update_values.norm() / self.weight_values.norm())

    @property
    def relative_spectral_norm(self) -> float:
        """‖ΔW‖₂ / ‖W‖₂: the farthest that the update can move an output, relative to the farthest that W can."""
        return float(self.update_values[0] / self.weight_values[0])

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / ‖ΔW‖₂²; 0 if ΔW is zero."""
        largest = float(self.update_values[0])
        return float((self.update_values / largest).square().sum()) if largest else 0.0

    @property
    def coverage(self) -> float:
        """Mean of `j / q` under the energy on both sides; 0 if ΔW is zero."""
        return _coverage(self.input_energy + self.output_energy)

    @property
    def block_coverages(self) -> tuple[float, ...]:
        """The coverage of each block's part of ΔW; empty where ΔW has no blocks."""
        return () if self.block_energy is None else tuple(map(_coverage, self.block_energy))


def update_spectrum(weight: Tensor, delta_weight: Tensor, blocks: Blocks | None = None) -> UpdateSpectrum:
    """Decompose W and ΔW with two full SVDs, in float32 or wider.

    Args:
        weight: W, (out_features, in_features).
        delta_weight: ΔW, (out_features, in_features).
        blocks: The blocks outside which ΔW is zero; None if it has no blocks.

    Raises:
        PartitionError: the shapes differ.
    """
    if weight.shape != delta_weight.shape:
        raise PartitionError(
            f"delta_weight has shape {tuple(delta_weight.shape)}, but the weight has shape {tuple(weight.shape)}; "
            "give the ΔW of this weight, as (out_features, in_features)"
        )
    W, delta = (
        decomposable(matrix.detach()).to(torch.promote_types(matrix.dtype, torch.float32))
        for matrix in (weight, delta_weight)
    )
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    by_row, by_column = (delta @ Vh.T).square(), (delta.T @ U).square()
    return UpdateSpectrum(
        weight_values=sigma.double().cpu(),
        update_values=torch.linalg.svdvals(delta).double().cpu(),
        input_energy=_shares(by_row.sum(0)),
        output_energy=_shares(by_column.sum(0)),
        block_energy=None if blocks is None else _by_block(by_row, by_column, blocks),
    )


def _by_block(by_row: Tensor, by_column: Tensor, blocks: Blocks) -> Tensor:
    """Energy of each block's rows and columns together, (num_blocks, q), from (m, q) and (n, q)."""
    by_block = torch.zeros(blocks.num_blocks, by_row.shape[1], dtype=torch.float64)
    for energy, labels in ((by_row, blocks.row_labels), (by_column, blocks.col_labels)):
        by_block.index_add_(0, labels.long().cpu(), energy.double().cpu())
    return by_block


def _coverage(energy: Tensor) -> float:
    """Mean of j / q under the energy (q,); 0 if that is zero."""
    total = energy.sum()
    place = torch.arange(len(energy), dtype=energy.dtype) / len(energy)
    return float(energy @ place / total) if total else 0.0


def _shares(energy: Tensor) -> Tensor:
    energy = energy.double().cpu()
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
