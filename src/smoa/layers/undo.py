"""What a merge overwrites, kept so that it can be put back bit for bit; and what no merge can serve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from smoa.errors import MergeError
from smoa.maths.spectrum import SpectralPartition


@dataclass(frozen=True)
class DiagonalBlocks:
    """Copies, on the CPU, of the diagonal blocks `W[I_k, J_k]` of a weight: 1/K of it, all that a merge can change."""

    rows: list[Tensor]
    cols: list[Tensor]
    entries: list[Tensor]

    @classmethod
    def read_from(cls, weight: Tensor, partition: SpectralPartition) -> DiagonalBlocks:
        """Copy the diagonal blocks of `weight` (out_features, in_features)."""
        rows = [partition.rows(block) for block in range(partition.num_blocks)]
        cols = [partition.cols(block) for block in range(partition.num_blocks)]
        entries = [weight.index_select(0, i).index_select(1, j).cpu() for i, j in zip(rows, cols, strict=True)]
        return cls(rows, cols, entries)

    def write_to(self, weight: Tensor) -> None:
        """Overwrite the diagonal blocks of `weight` in place, in its dtype, which may have changed since."""
        for rows, cols, entries in zip(self.rows, self.cols, self.entries, strict=True):
            rows, cols = rows.to(weight.device), cols.to(weight.device)
            weight[rows[:, None], cols] = entries.to(weight)


def refuse_shared(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise MergeError if two adapted layers, by name, have one weight: merged for one, it would serve neither."""
    owners: dict[int, str] = {}
    for name, weight in weights:
        pointer = weight.data_ptr()  # 0 on the meta device
        other = owners.setdefault(pointer, name)
        if pointer and other != name:
            raise MergeError(
                f"{name} and {other} share one weight but have an adapter each, so no merged weight serves both; untie "
                "them, or adapt one of them"
            )
