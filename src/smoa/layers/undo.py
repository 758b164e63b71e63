"""What a merge overwrites, kept so that it can be put back bit for bit; and what no merge can serve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from smoa.errors import MergeError
from smoa.maths.blocks import Blocks


@dataclass(frozen=True)
class DiagonalBlocks:
    """Copies, on the CPU, of the diagonal blocks `W[I_k, J_k]` of a weight: 1/K of it, all that a merge can change."""

    blocks: Blocks
    entries: list[Tensor]

    @classmethod
    def read_from(cls, weight: Tensor, blocks: Blocks) -> DiagonalBlocks:
        """Copy the diagonal blocks of `weight` (out_features, in_features)."""
        own = Blocks(blocks.row_labels.cpu().clone(), blocks.col_labels.cpu().clone(), blocks.num_blocks)
        return cls(own, [entries.cpu() for entries in blocks.of(weight)])

    def write_to(self, weight: Tensor) -> None:
        """Overwrite the diagonal blocks of `weight` in place, in its dtype, which may have changed since."""
        self.blocks.write(weight, self.entries)


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
