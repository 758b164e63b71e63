"""Keeps the diagonal blocks that a merge overwrites, and finds weights that several modules use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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


def refuse_shared(layers: Iterable[tuple[str, Tensor, Mapping[str, object]]]) -> None:
    """Raise MergeError if layers share one weight but not their adapters: a merged weight would be wrong for both.

    Args:
        layers: Name, stored weight and factors (by adapter) of each adapted layer.
    """
    owners: dict[int, tuple[str, Mapping[str, object]]] = {}
    for name, weight, factors in layers:
        pointer = weight.data_ptr()  # 0 on the meta device
        other, others_factors = owners.setdefault(pointer, (name, factors))
        if pointer and others_factors != factors:
            raise MergeError(
                f"{name} and {other} share one weight but have an adapter each, so no merged weight is right for both; "
                "untie them, adapt one of them only, or set ensure_weight_tying=True before training"
            )


def users_of(model: nn.Module) -> Counter[int]:
    """How many modules use each parameter, by its id. Several use that of tied embeddings."""
    return Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
