"""Keeps the diagonal blocks that a merge overwrites, and finds weights that several modules use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from smoa.errors import MergeError
from smoa.maths.blocks import Blocks


@dataclass(frozen=True)
class DiagonalBlocks:
    """Copies on the CPU of a weight's diagonal blocks `W[I_k, J_k]`: 1/K of W, and all that a merge can change."""

    blocks: Blocks
    entries: list[Tensor]

    @classmethod
    def read_from(cls, weight: Tensor, blocks: Blocks) -> DiagonalBlocks:
        """Copy the diagonal blocks of `weight` (out_features, in_features)."""
        own = Blocks(blocks.row_labels.cpu().clone(), blocks.col_labels.cpu().clone(), blocks.num_blocks)
        return cls(own, [entries.cpu() for entries in blocks.of(weight)])

    def write_to(self, weight: Tensor) -> None:
        """Overwrite the diagonal blocks of `weight` in place, in its current dtype."""
        self.blocks.write(weight, self.entries)


def refuse_shared(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise MergeError if two adapted layers share one weight: a merged weight would be wrong for both.

    Args:
        weights: Names and stored weights of the layers.
    """
    owners: dict[int, str] = {}
    for name, weight in weights:
        pointer = weight.data_ptr()  # 0 on the meta device
        other = owners.setdefault(pointer, name)
        if pointer and other != name:
            raise MergeError(
                f"{name} and {other} share one weight but have an adapter each, so no merged weight is right for both; "
                "untie them, or adapt one of them only"
            )


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules use, as tied embeddings do."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {parameter for parameter, number in users.items() if number > 1}
