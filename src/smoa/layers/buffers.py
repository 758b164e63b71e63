"""Labels and block scales of an adapted layer, in buffers that are never cast, and how they are decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from smoa.maths.blocks import Blocks
from smoa.maths.experts import stack_partition
from smoa.maths.scale import ModulationKind, ScaleKind, block_scale
from smoa.maths.spectrum import PartitionKind, make_partition
from smoa.state import cached_spectral_scores


@dataclass(frozen=True)
class PartitionSpec:
    """How to make an adapter's blocks and block scales from the weight."""

    partition: PartitionKind
    modulation: ModulationKind
    scale: ScaleKind
    seed: int = 0
    """Of a random partition."""

    def decide(self, num_blocks: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels, column labels and block scales, on the CPU.

        Args:
            num_blocks: K.
            weight: W (m, n), for (m,), (n,) and (K,). Or W of all experts (experts, halves, m, n), for (G, m), (G, n)
                and (G, K), where G = experts·halves.
        """
        how = self.partition, cached_spectral_scores, torch.Generator().manual_seed(self.seed)
        if weight.dim() == 2:
            blocks = make_partition(weight, num_blocks, *how)
            return blocks.row_labels.cpu(), blocks.col_labels.cpu(), self._block_scale(weight, blocks)
        rows, cols = stack_partition(weight, num_blocks, *how)
        matrices = (matrix for expert in weight for matrix in expert)
        labels = zip(matrices, rows.to(weight.device), cols.to(weight.device), strict=True)
        scales = [self._block_scale(matrix, Blocks(row, col, num_blocks)) for matrix, row, col in labels]
        return rows, cols, torch.stack(scales)

    def _block_scale(self, weight: Tensor, blocks: Blocks) -> Tensor:
        return block_scale(self.scale, None if self.modulation == "none" else weight, blocks)


class AdapterBuffers(nn.Module):
    """A tensor of each adapter, by the adapter's name, that moves with the layer and keeps its dtype.

    PEFT casts a `BufferDict` to the base layer's dtype, and moves it to the meta device together with a weight that
    accelerate offloads. This is none, and stays in memory then.
    """

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.persistent, self.replaced = persistent, 0

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]  # none is None

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._buffers[name], self.replaced = tensor, self.replaced + 1
        if not self.persistent:
            self._non_persistent_buffers_set.add(name)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, tensor in self._buffers.items():
            moved = fn(tensor)  # type: ignore[arg-type]  # none is None
            if not moved.is_meta:
                self._buffers[name] = moved if moved.dtype == self[name].dtype else self[name].to(moved.device)
        return self
