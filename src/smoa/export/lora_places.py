"""Where a LoRA adapts what a SMoA adapter does, and how PEFT's LoRA stores its factors there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from smoa.layers.experts import ParamWrapper
from smoa.layers.layer import SmoaLayer
from smoa.layers.layout import Layout


class Spectrum(Protocol):
    """What makes the best factors of any rank for one matrix."""

    def factors(self, rank: int, width: int) -> tuple[Tensor, Tensor]:
        """A: (width, n) and B: (m, width), zero from `rank` on."""


@dataclass(frozen=True)
class Place:
    """A layer, or a parameter of experts.

    Args:
        name: Name of the adapted layer, for the names of LoRA's tensors.
        key: Name of the module or parameter, for targets and patterns.
        matrices: Names of the matrices that it holds.
        layout: How a parameter holds them; None for a layer.
        is_marked: Whether PEFT knows that the parameter is transposed. If it doesn't, it exchanges inputs and outputs.
        base: The base layer, of whose kind the names and shapes of LoRA's tensors are; None for a parameter.
    """

    name: str
    key: str
    matrices: tuple[str, ...] = ()
    layout: Layout | None = None
    is_marked: bool = True
    base: nn.Module | None = None

    @classmethod
    def of(cls, name: str, layer: SmoaLayer) -> Place:
        """The place of an adapted layer, without its matrices."""
        if not isinstance(layer, ParamWrapper):
            return cls(name, name, base=layer.get_base_layer())
        key = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        marked = bool(getattr(layer.get_base_layer(), "is_transposed", False))
        return cls(name, key, layout=layer.layout, is_marked=marked == layer.layout.transposed)

    def name_of(self, part: str) -> str:
        """Name of a matrix, given its name within the layer."""
        return self.key.rpartition(".")[0] + "." + part if part else self.name

    @property
    def halves(self) -> int:
        """Matrices of each expert, of which a LoRA sees one."""
        return 1 if self.layout is None else self.layout.halves

    def _of_experts(self) -> list[tuple[str, ...]]:
        return [self.matrices[i : i + self.halves] for i in range(0, len(self.matrices), self.halves)]

    def width(self, ranks: Mapping[str, int]) -> int:
        """The LoRA's rank: of the expert that needs most, all its matrices together."""
        return max(sum(ranks[matrix] for matrix in expert) for expert in self._of_experts())

    def named_factors(self, spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], width: int) -> dict[str, Tensor]:
        """LoRA's factors in the names and shapes that PEFT gives them for this kind of base layer."""
        A, B = self.factors(spectra, ranks, width)
        if isinstance(self.base, nn.Embedding):  # PEFT's ΔW is the table transposed
            return {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
        if isinstance(self.base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kernel = self.base.kernel_size
            A, B = A.view(len(A), self.base.in_channels, *kernel), B.view(*B.shape, *(1 for _ in kernel))
        return {"lora_A.weight": A, "lora_B.weight": B}

    def factors(self, spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], width: int) -> tuple[Tensor, Tensor]:
        """LoRA's A and B: (width, n) and (m, width) for a layer, and those of all experts as PEFT joins them."""
        pairs = [self._of_expert(expert, spectra, ranks, width) for expert in self._of_experts()]
        if self.layout is None or len(pairs) == 1:
            return pairs[0]
        if not self.is_marked:
            pairs = [(B.T, A.T) for A, B in pairs]
        A, B = zip(*pairs, strict=True)
        return torch.cat(A), torch.stack(B, dim=-1).flatten(1)

    def _of_expert(
        self, matrices: tuple[str, ...], spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], width: int
    ) -> tuple[Tensor, Tensor]:
        """The factors of one expert's matrices, each in ranks of its own."""
        if self.halves == 1:
            return spectra[matrices[0]].factors(ranks[matrices[0]], width)
        assert self.layout is not None, "a layer has one matrix"
        pairs = [spectra[matrix].factors(ranks[matrix], ranks[matrix]) for matrix in matrices]
        A = torch.cat([pair[0] for pair in pairs])
        B = A.new_zeros(width, self.halves, self.layout.out_features)
        start = 0
        for half, (_, part) in enumerate(pairs):
            B[start : start + part.shape[1], half] = part.T
            start += part.shape[1]
        return torch.cat([A, A.new_zeros(width - start, A.shape[1])]), self.layout.join(B).T
