"""The tensors of each layer of a saved adapter, checked before anything takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import AdapterFileError, ConfigError
from smoa.files.checks import check_layout, check_values
from smoa.files.names import PARTS, PREFIX
from smoa.layers.layer import RANDOM_SIZE
from smoa.maths.blocks import Blocks
from smoa.maths.factors import Initialization, init_factors, saved_shapes
from smoa.maths.scale import ModulationKind, rank_scale

SMALL = 1e4
"""If all values are smaller, none leaves float16, and no ΔW leaves float32."""


def folder_in(place: Path, name: str) -> Path | None:
    """The folder of the adapter `name` right in `place`; None if the name leads elsewhere, or to no folder."""
    is_name = Path(name).name == name and name not in ("", "..")
    return place / name if is_name and (place / name).is_dir() else None


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

    def blocks(self, device: torch.device) -> Blocks:
        """The blocks of the layer, on a device."""
        return Blocks(self.row_labels.to(device), self.col_labels.to(device), len(self.ranks))

    @property
    def digest(self) -> int:
        """Equal for equal blocks."""
        return hash((self.row_labels.cpu().numpy().tobytes(), self.col_labels.cpu().numpy().tobytes()))

    @property
    def device(self) -> torch.device:
        """Where it is: vLLM's manager asks no more than this and `pin_memory` of what is in the place of `lora_a`."""
        return self.A.device

    def pin_memory(self) -> Self:
        """Itself: it is copied once for each activation."""
        return self

    def drawn(self, init: Initialization) -> Self:
        """The layer with new factors, as an adapted layer draws them."""
        A, B = torch.empty_like(self.A), torch.empty_like(self.B)
        sizes = len(self.row_labels), len(self.col_labels)
        init_factors(A, B, sizes, self.ranks, init, RANDOM_SIZE / self.scaling)
        if init is False:
            B.div_(rank_scale(self.block_scale, self.ranks))  # the same size for every scale, as in an adapted layer
        return replace(self, A=A, B=B)


def checked_layers(
    found: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, int]], config: SmoaConfig, source: str
) -> dict[str, SavedLayer]:
    """The layers of these shapes, of what `by_layer` has found."""
    by_name = config.rank_pattern or config.alpha_pattern or config.num_blocks_pattern

    @cache
    def sizes_of(path: str, shape: tuple[int, int]) -> tuple[tuple[int, ...], float, tuple[tuple[int, ...], ...]]:
        ranks = config.ranks_of(path, shape=shape)
        return ranks, config.alpha_of(path, sum(ranks), shape) / sum(ranks), saved_shapes(shape, ranks)

    layers, tensors = dict[str, SavedLayer](), dict[str, dict[str, Tensor]]()
    try:
        for path, shape in shapes.items():
            if lacking := [part for part in PARTS if part not in found[path]]:
                raise AdapterFileError(f"lacks {path}.{lacking[0]}; save or fetch the adapter again")
            ranks, scaling, sizes = sizes_of(path if by_name else "", shape)
            tensors[path] = {f"{path}.{part}": found[path][part] for part in PARTS}
            check_layout(tensors[path], sizes, len(ranks))
            A, B, rows, cols, scale = tensors[path].values()
            own = ranks, config.modulation, scaling, config.partition == "spectral"
            layers[path] = SavedLayer(*own, A, B, rows, cols, scale.float())
        values = [part for layer in layers.values() for part in (layer.A, layer.B, layer.block_scale)]
        largest = max(abs(layer.scaling) * max(layer.ranks) for layer in layers.values())
        if not (float(nn.utils.get_total_norm(values, torch.inf)) < SMALL and largest < SMALL):  # or one is NaN
            for path, layer in layers.items():
                check_values(path, tensors[path], layer.ranks, layer.scaling, layer.A.dtype)
    except AdapterFileError as error:
        raise AdapterFileError(f"{source}: {error}") from None
    return layers
