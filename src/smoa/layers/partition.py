"""The blocks of an adapter in one layer: how they are decided, where they are kept, and what follows from them.

Labels and block scales are kept in three `AdapterTensors` of the layer, by which they have their names in files. They
are no buffers, so nothing casts, broadcasts or offloads them. `Derived` follows from them, and is made anew when they
are written to or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Self

import torch
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import PartitionError
from smoa.layers.distributed import whole
from smoa.maths.blocks import UNDECIDED, Blocks, Orders, ascend, check_labels
from smoa.maths.experts import stack_partition, stacked_blocks
from smoa.maths.kernels.operators import is_transformed
from smoa.maths.scale import ModulationKind, ScaleKind, block_scale, rank_scale
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
        stacked = stacked_blocks(rows.to(weight.device), cols.to(weight.device), num_blocks)
        matrices = (matrix for expert in weight for matrix in expert)
        scales = [self._block_scale(matrix, blocks) for matrix, blocks in zip(matrices, stacked, strict=True)]
        return rows, cols, torch.stack(scales)

    def _block_scale(self, weight: Tensor, blocks: Blocks) -> Tensor:
        return block_scale(self.scale, None if self.modulation == "none" else weight, blocks)


class AdapterTensors(nn.Module):
    """A tensor of each adapter, by the adapter's name, that is moved, saved and loaded with the layer, and never cast.

    `state_dict` hands out the tensors themselves. As attributes, `torch.func.functional_call` and
    `torch.distributed.checkpoint` find them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.replaced = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.tensors[name], self.replaced = tensor, self.replaced + 1

    def __delitem__(self, name: str) -> None:
        del self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getattr__(self, name: str) -> Any:
        tensors = self.__dict__.get("tensors", {})
        return tensors[name] if name in tensors else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("tensors", {}):
            self[name] = value
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def write(self, name: str, values: Tensor) -> None:
        """Write in place, which a state dict sees, or keep a copy where there is nothing to write to."""
        known = self.tensors.get(name)
        if known is None or known.is_meta or known.is_inference() or known.shape != values.shape:
            self[name] = values.clone() if known is None else values.to(known.dtype, copy=True)
        else:
            known.copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, tensor in self.tensors.items():
            moved = fn(tensor)
            if not moved.is_meta:  # where accelerate offloads a weight, labels stay
                self.tensors[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.tensors.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key.removeprefix(prefix): whole(state_dict[key]) for key in state_dict if key.startswith(prefix)}
        for name, tensor in self.tensors.items():
            if name in given and given[name].shape != tensor.shape:
                shapes = f"{tuple(given[name].shape)} in the file, {tuple(tensor.shape)} in the model"
                error_msgs.append(f"size mismatch for {prefix}{name}: {shapes}")
            elif name in given and not given[name].is_meta:
                self.write(name, given[name])
        if strict:
            missing_keys += [prefix + name for name in self.tensors if name not in given]
            unexpected_keys += [prefix + name for name in given if name not in self.tensors]


@dataclass(frozen=True, eq=False)
class Derived:
    """What follows from an adapter's labels and block scales.

    Args:
        saved: Row labels, column labels and block scales.
        versions: How often these had been written to.
        blocks: Of each matrix of the layer.
        rank_scale: The block scale of the block that each rank belongs to, float32 (r,), or (G, r).
        digest: The same for equal labels.
    """

    saved: tuple[Tensor, ...]
    versions: list[int]
    blocks: list[Blocks]
    rank_scale: Tensor
    digest: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, saved: tuple[Tensor, ...], ranks: Sequence[int]) -> Derived:
        """Sort the labels and compare them, which waits for their device. Called when they change, never in a step."""
        rows, cols, scale = saved
        if rows.dim() == 2:
            return cls(saved, versions(saved), stacked_blocks(rows, cols, len(ranks)), rank_scale(scale, ranks))
        shape = rows.shape[0], cols.shape[0]
        blocks = Blocks(rows, cols, len(ranks), Orders.of(rows, cols), ascend(rows, cols), shape)
        digest = 0 if rows.is_meta else hash(torch.cat([rows, cols]).cpu().numpy().tobytes())
        return cls(saved, versions(saved), [blocks], rank_scale(scale, ranks), digest)

    def holds(self, saved: tuple[Tensor, ...]) -> bool:
        """Whether this still follows from these tensors."""
        return all(map(is_, saved, self.saved)) and versions(saved) == self.versions


class AdapterPartition:
    """An adapter's blocks and block scales in one layer.

    Args:
        stores: The layer's row labels, column labels and block scales.
        name: The adapter.
        config: Its settings.
        spec: How its blocks are decided.
        ranks: r_k of every block.
    """

    def __init__(
        self,
        stores: tuple[AdapterTensors, AdapterTensors, AdapterTensors],
        name: str,
        config: SmoaConfig,
        spec: PartitionSpec,
        ranks: tuple[int, ...],
    ) -> None:
        self.stores, self.name, self.config, self.spec, self.ranks = stores, name, config, spec, ranks
        self.pending = True
        """Whether labels and scales are not decided yet: they will be loaded, or computed when they are needed."""
        self.derivations = 0
        self._derived: Derived | None = None

    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels, column labels and block scales, as they are stored."""
        rows, cols, scale = (store[self.name] for store in self.stores)
        return rows, cols, scale

    def reserve(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        """Make room for labels and scales of these shapes, undecided."""
        for store, shape in zip(self.stores[:2], shapes[:2], strict=True):
            store.write(self.name, torch.full(shape, UNDECIDED, dtype=torch.uint8, device=device))
        self.stores[2].write(self.name, torch.ones(shapes[2], device=device, dtype=torch.float32))

    def decide(self, row_labels: Tensor, col_labels: Tensor, block_scale: Tensor) -> None:
        """Write labels and scales."""
        for store, tensor in zip(self.stores, (row_labels, col_labels, block_scale), strict=True):
            store.write(self.name, tensor)
        self.pending = False
        self.derived()

    def move(self, device: torch.device) -> None:
        """Move labels and scales to a device."""
        for store in self.stores:
            store[self.name] = store[self.name].to(device)

    def is_valid(self) -> bool:
        """Whether the labels are there, and a partition."""
        rows, cols, _ = self.saved()
        if rows.is_meta:
            return False
        try:
            for labels in (*rows.view(-1, rows.shape[-1]), *cols.view(-1, cols.shape[-1])):
                check_labels(labels, len(self.ranks), "labels")
        except PartitionError:
            return False
        return True

    def derived(self) -> Derived:
        """What follows from labels and scales; made anew if they were replaced or written to.

        Of labels that a transform (`torch.func`) has put in place for a call, nothing is kept. A compiled model doesn't
        look: labels don't change while it runs.
        """
        if torch.compiler.is_compiling() and self._derived is not None:
            return self._derived
        saved = self.saved()
        if self._derived is None or not self._derived.holds(saved):
            if self._derived is not None and is_transformed(*saved):
                rows, cols, scale = saved
                blocks = self._derived.blocks
                if rows.dim() == 1:
                    blocks = [Blocks(rows, cols, len(self.ranks), Orders.of(rows, cols), False, blocks[0].shape)]
                return Derived(saved, [], blocks, rank_scale(scale, self.ranks))
            with torch.inference_mode(False):  # what is made in inference mode can't be used in training
                self._derived = Derived.of(saved, self.ranks)
            self.derivations += 1
        return self._derived


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often tensors were written to; of those made in inference mode it is not known."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
