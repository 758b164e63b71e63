"""The tensors of each layer of a saved adapter, checked before anything takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, ConfigError
from smoa.files.checks import check_parts
from smoa.files.names import PARTS, PREFIX
from smoa.layers.layer import RANDOM_SIZE
from smoa.maths.blocks import Blocks
from smoa.maths.factors import Initialization, init_factors, saved_shapes
from smoa.maths.scale import ModulationKind, rank_scale


def by_layer(tensors: Mapping[str, Tensor], source: str, remedy: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a saved adapter by layer and part; raises ConfigError, with the remedy, if it has any others."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, part = key.removeprefix(PREFIX).partition(".smoa_")
        if f"smoa_{part}" not in PARTS:
            raise ConfigError(f"{source}: has {key}; {remedy}")
        found.setdefault(path, {})[f"smoa_{part}"] = tensor
    return found


@dataclass(frozen=True)
class SavedLayer:
    """The checked tensors of one layer of an adapter."""

    ranks: tuple[int, ...]
    modulation: ModulationKind
    scaling: float
    is_spectral: bool
    A: Tensor
    B: Tensor
    row_labels: Tensor
    col_labels: Tensor
    block_scale: Tensor

    @classmethod
    def checked(
        cls, path: str, shape: tuple[int, int], config: SmoaConfig, parts: Mapping[str, Tensor], source: str
    ) -> Self:
        """Those of a layer of this shape.

        Raises:
            AdapterFileError: a part is missing, not finite, or doesn't fit.
        """
        lacking = next((part for part in PARTS if part not in parts), None)
        if lacking is not None:
            raise AdapterFileError(f"{source}: lacks {path}.{lacking}; save or fetch the adapter again")
        if len(parts) > len(PARTS):
            raise AdapterFileError(f"{source}: {path} has {sorted(parts)}, expected {sorted(PARTS)}")
        ranks = config.ranks_of(path, shape=shape)
        sizes = saved_shapes(shape, ranks)
        scaling = config.alpha_of(path, sum(ranks), shape) / sum(ranks)
        A, B, rows, cols, scale = (parts[part] for part in PARTS)
        try:
            check_parts(path, {f"{path}.{part}": parts[part] for part in PARTS}, sizes, ranks, scaling, A.dtype)
        except AdapterFileError as error:
            raise AdapterFileError(f"{source}: {error}") from None
        return cls(ranks, config.modulation, scaling, config.partition == "spectral", A, B, rows, cols, scale.float())

    def blocks(self, device: torch.device) -> Blocks:
        """The blocks of the layer, on a device."""
        return Blocks(self.row_labels.to(device), self.col_labels.to(device), len(self.ranks))

    @property
    def digest(self) -> int:
        """Equal for equal blocks."""
        return hash((self.row_labels.cpu().numpy().tobytes(), self.col_labels.cpu().numpy().tobytes()))

    def drawn(self, init: Initialization) -> Self:
        """The layer with new factors, as an adapted layer draws them."""
        A, B = torch.empty_like(self.A), torch.empty_like(self.B)
        sizes = len(self.row_labels), len(self.col_labels)
        init_factors(A, B, sizes, self.ranks, init, RANDOM_SIZE / self.scaling)
        if init is False:
            B.div_(rank_scale(self.block_scale, self.ranks))  # the same size for every scale, as in an adapted layer
        return replace(self, A=A, B=B)
