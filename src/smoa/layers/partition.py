"""The blocks of an adapter in one layer: how they are decided, where they are kept, and what follows from them.

Labels and block scales are buffers of the layer, because DeepSpeed saves and `torch.distributed.checkpoint` loads
parameters and buffers alone. `Derived` follows from them, is no buffer, and is made anew when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, is_
from typing import Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from smoa.maths.blocks import Blocks, Orders, ascend
from smoa.maths.scale import ModulationKind, ScaleKind, block_scale, rank_scale
from smoa.maths.spectrum import PartitionKind, make_partition
from smoa.maths.stack import Side
from smoa.scores import cached_spectral_scores


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
        generator = torch.Generator().manual_seed(self.seed)

        def decided(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            blocks = make_partition(matrix, num_blocks, self.partition, cached_spectral_scores, generator)
            scale = block_scale(self.scale, None if self.modulation == "none" else matrix, blocks)
            return blocks.row_labels.cpu(), blocks.col_labels.cpu(), scale

        if weight.dim() == 2:
            return decided(weight)
        matrices = [matrix for expert in weight for matrix in expert]  # views, which `flatten` may not give
        hidden = None if self.partition == "spectral" else True  # None: shown on a terminal only
        bar = tqdm(matrices, "SMoA partitions of experts", unit="matrix", delay=1, disable=hidden, leave=False)
        rows, cols, scales = zip(*map(decided, bar), strict=True)
        return torch.stack(rows), torch.stack(cols), torch.stack(scales)


class AdapterBuffers(nn.Module):
    """A tensor of each adapter, by the adapter's name, that moves with the layer and keeps its dtype.

    PEFT casts a `BufferDict` to the base layer's dtype, and moves it to the meta device together with a weight that
    accelerate offloads. This is none, and stays in memory then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0
        """How often a tensor was replaced, or found to have been written to. It never falls."""

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]  # none is None

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._buffers[name], self.changes = tensor, self.changes + 1

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def write(self, name: str, values: Tensor) -> None:
        """Write in place, which a state dict sees, or keep a copy where there is nothing to write to."""
        known = self._buffers.get(name)
        if known is None or known.is_meta or known.shape != values.shape:
            self[name] = values.clone()
        else:
            known.copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, tensor in self._buffers.items():
            moved = fn(tensor)  # type: ignore[arg-type]  # none is None
            if not moved.is_meta:
                self._buffers[name] = moved if moved.dtype == self[name].dtype else self[name].to(moved.device)
        return self


_BLOCKS: WeakValueDictionary[object, Blocks] = WeakValueDictionary()
"""The blocks of labels that adapters have now: those of one base share the sorted coordinates."""


@dataclass(eq=False)
class Derived:
    """What follows from an adapter's labels and block scales.

    Args:
        saved: Row labels, column labels and block scales, as the layer has them.
        versions: How often these had been written to, if that is known.
        labels: Copies of the labels.
        block_scale: The block scales in float32, which FSDP1 may have rounded in the layer.
        rank_scale: The block scale of the block that each rank belongs to, float32 (r,), or (G, r).
        blocks: The blocks of a layer's one matrix, or both sides of those of a stack.
        digest: The same for equal labels.
    """

    saved: tuple[Tensor, ...]
    versions: list[int] | None
    labels: tuple[Tensor, ...]
    block_scale: Tensor
    rank_scale: Tensor
    blocks: Blocks | tuple[Side, Side]
    digest: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, saved: tuple[Tensor, ...], ranks: Sequence[int], halves: int, exact: Tensor | None = None) -> Derived:
        """Sort the labels and compare them, which waits for their device. Called when they change, never in a step.

        Args:
            saved: As above.
            ranks: r_k of every block.
            halves: H of a stack.
            exact: The block scales before they were rounded, if they were.
        """
        rows, cols, scale = saved
        scale = scale.to(torch.float32, copy=True) if exact is None else exact.to(scale.device)
        kept = saved, versions(saved), (rows.clone(), cols.clone()), scale, rank_scale(scale, ranks)
        if rows.dim() == 2:
            outputs, inputs = (Side.of(side.unflatten(0, (-1, halves)), len(ranks)) for side in (rows, cols))
            return cls(*kept, (outputs, inputs))
        shape = rows.shape[0], cols.shape[0]
        digest = 0 if rows.is_meta else hash(torch.cat([rows, cols]).cpu().numpy().tobytes())
        key = digest, *shape, rows.device, len(ranks)
        if (known := None if rows.is_meta else _BLOCKS.get(key)) is not None:
            return cls(*kept, replace(known, row_labels=rows, col_labels=cols), digest)
        blocks = Blocks(rows, cols, len(ranks), Orders.of(rows, cols), ascend(rows, cols), shape)
        if not rows.is_meta:
            _BLOCKS[key] = blocks
        return cls(*kept, blocks, digest)

    def has_labels(self, rows: Tensor, cols: Tensor) -> bool:
        """Whether these are the labels, and on their device."""
        own_rows, own_cols = self.labels
        return rows.device == own_rows.device and torch.equal(rows, own_rows) and torch.equal(cols, own_cols)

    def rounds_to(self, scale: Tensor) -> bool:
        """Whether these are the block scales in this tensor's dtype."""
        known = self.block_scale
        return known.shape == scale.shape and torch.equal(known.to(scale.device, scale.dtype), scale)


def are_unchanged(tensors: Sequence[Tensor], known: Sequence[Tensor], known_versions: list[int] | None) -> bool:
    """Whether these are the known tensors, and nobody has written to them, as far as that can be seen."""
    return known_versions is not None and all(map(is_, tensors, known)) and versions(tensors) == known_versions


def versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """How often tensors were written to; None for those made in inference mode, whose writes PyTorch doesn't count."""
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:
        return None
