"""How an adapted layer merges its adapters into the base weight, and restores every bit of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from smoa.distributed import onloaded_for, placed_like
from smoa.errors import MergeError
from smoa.kernels.one_product import Effective, Update
from smoa.partition import Blocks


@dataclass
class Pristine:
    """What a weight was before adapters were merged into it.

    Args:
        blocks: For each matrix W, the blocks of one merged adapter after the other and what W had in them, on the CPU:
            1/K of W, and all that the merge changes.
        replaced: A quantized base layer, while a copy stands in its place.
    """

    blocks: dict[int, list[tuple[Blocks, list[Tensor]]]] = field(default_factory=dict)
    replaced: nn.Module | None = None

    def keep(self, number: int, matrix: Tensor, blocks: Blocks) -> None:
        """Copy the diagonal blocks of the matrix of this number."""
        own = Blocks(blocks.row_labels.cpu(), blocks.col_labels.cpu(), blocks.num_blocks)
        self.blocks.setdefault(number, []).append((own, [entries.cpu() for entries in blocks.of(matrix)]))

    def write_to(self, matrix: Tensor, number: int) -> None:
        """Overwrite the diagonal blocks of the matrix of this number in place, in its current dtype."""
        for blocks, entries in self.blocks.get(number, ()):
            blocks.write(matrix, entries)


class Merging:
    """The part of `SmoaLayer` that writes to the base weight."""

    pristine: Pristine | None = None
    """Set while adapters are merged."""

    @torch.no_grad()
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight W by `W + Σ ΔW`; for a stack, every W, one after the other.

        The diagonal blocks of W, 1/K of it, are kept on the CPU for `unmerge`.

        Args:
            safe_merge: Raise MergeError instead of writing NaN or infinite weights.
            adapter_names: Adapters to add to those that are merged already; None means the active ones.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        chosen = [*self.merged_adapters, *names]
        with onloaded_for(self, names, written=True), _writing(self.stored_weight()):
            if safe_merge and not all(merged.isfinite().all() for _, _, merged, _ in self.merged_matrices(chosen)):
                raise MergeError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
                )
            for number, pristine, merged, updates in self.merged_matrices(chosen):
                self._write_merged(number, pristine, merged, updates[-len(names) :])
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self: Any) -> None:
        """Restore the pristine weight, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with onloaded_for(self, [], written=True), _writing(self.stored_weight()):
            self._restore_pristine()
        self.merged_adapters.clear()

    def merged_matrices(self: Any, adapter_names: list[str]) -> Iterator[tuple[int, Tensor, Tensor, list[Update]]]:
        """Number, pristine W, `W + Σ ΔW`, rounded once, and the update of each adapter, of one matrix after the other.

        W + Σ ΔW is formed in the pieces that training multiplies with, so that no matrix is held but the merged one.
        Off the diagonal blocks, which are all that `unmerge` restores, it has W's own bits.
        """
        of_adapters = [self.updates(name) for name in adapter_names]
        for number, *updates in zip(range(self.matrix_count or 1), *of_adapters, strict=True):
            pristine = self.pristine_matrix(number)
            merged = pristine.clone()
            for rows, effective in Effective(pristine, *updates, transposed=self.fan_in_fan_out).rows():
                for blocks in {update.blocks: None for update in updates}:
                    in_block = blocks.row_labels[rows, None] == blocks.col_labels
                    merged[rows] = torch.where(in_block, effective, merged[rows])
            yield number, pristine, merged, updates

    def _write_merged(self: Any, number: int, pristine: Tensor, merged: Tensor, updates: list[Update]) -> None:
        """Write a matrix with these updates."""
        self.pristine = self.pristine or Pristine()
        for update in updates:
            self.pristine.keep(number, pristine, update.blocks)
        self._write_matrix(merged, number)

    def _restore_pristine(self: Any) -> None:
        for number in self.pristine.blocks:
            matrix = self.base_weight(number)
            self.pristine.write_to(matrix, number)
            self._write_matrix(matrix, number)
        self.pristine = None

    def _write_matrix(self: Any, matrix: Tensor, number: int) -> None:
        """Overwrite one of the layer's weights by `matrix` (out_features, in_features), unless that is a view of it."""
        stored = self.stored_weight()
        if matrix.data_ptr() != stored.data_ptr():
            stored.copy_(placed_like(stored, as_stored(matrix, stored.shape, self.fan_in_fan_out)))


def _writing(stored: Tensor) -> AbstractContextManager[Any]:
    """Where PyTorch lets one write to a weight: to one made in inference mode there alone."""
    return torch.inference_mode() if stored.is_inference() else nullcontext()


def as_matrix(stored: Tensor, fan_in_fan_out: bool) -> Tensor:
    """W (out_features, in_features) of a weight as stored: transposed in a Conv1D, with a kernel in a convolution."""
    return stored.T if fan_in_fan_out else stored.flatten(1)


def as_stored(matrix: Tensor, shape: Sequence[int], fan_in_fan_out: bool) -> Tensor:
    """The inverse of `as_matrix`, for a weight that is stored in `shape`."""
    return matrix.T if fan_in_fan_out else matrix.reshape(shape)
