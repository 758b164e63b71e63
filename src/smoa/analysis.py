"""The public path of the measures of an update's spectrum."""

from __future__ import annotations

from smoa.maths.analysis import (
    UpdateSize,
    UpdateSpectrum,
    effective_rank,
    numerical_rank,
    stable_rank,
    update_size,
    update_spectrum,
)

__all__ = [
    "UpdateSize",
    "UpdateSpectrum",
    "effective_rank",
    "numerical_rank",
    "stable_rank",
    "update_size",
    "update_spectrum",
]
