"""How an adapted layer merges its adapters into the base weight, and restores every bit of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from smoa.errors import MergeError
from smoa.layers.distributed import onloaded_for, placed_like, refuse_writing, writing
from smoa.maths.blocks import Blocks
from smoa.maths.kernels.one_product import Effective, delta_of
from smoa.maths.update import Update

LOSS_ROWS = 256
"""Rows of ΔW that are formed at a time to see what a merge loses."""

UNDO = (
    "undo that by remove_weight_norm, remove_spectral_norm, prune.remove or parametrize.remove_parametrizations of "
    "torch.nn.utils"
)
"""How a weight that is computed from others becomes a parameter."""


class Loss(NamedTuple):
    """What a merge has made of ΔW in a matrix: ‖E − ΔW‖, ‖ΔW‖ and ⟨E, ΔW⟩, where E is what it added to W."""

    error: float
    size: float
    kept: float


@dataclass
class Pristine:
    """What a weight was before adapters were merged into it: the one place where that is kept.

    Layers of one memory hold the same one. Each restores from it the weight that it has then.

    Args:
        blocks: For each matrix W, the blocks of one merged adapter after the other and what W had in them, on the CPU:
            1/K of W, and all that the merge can change.
        replaced: The base layer's own weight, or a quantized base layer, while another one stands in its place.
    """

    blocks: dict[int, list[tuple[Blocks, list[Tensor]]]] = field(default_factory=dict)
    replaced: nn.Parameter | nn.Module | None = None

    def keep(self, number: int, matrix: Tensor, blocks: Blocks) -> None:
        """Copy the diagonal blocks of the matrix of this number."""
        own = Blocks(blocks.row_labels.cpu(), blocks.col_labels.cpu(), blocks.num_blocks)
        self.blocks.setdefault(number, []).append((own, [entries.cpu() for entries in blocks.of(matrix)]))

    def write_to(self, matrix: Tensor, number: int) -> None:
        """Overwrite the diagonal blocks of the matrix of this number in place, in its current dtype."""
        for blocks, entries in self.blocks.get(number, ()):  # a merge may have failed before it came to this one
            blocks.write(matrix, entries)

    def is_in(self, matrix: Tensor, number: int) -> bool:
        """Whether the matrix of this number has what is kept of it."""
        kept = ((blocks.of(matrix.cpu()), entries) for blocks, entries in self.blocks[number])
        return all(
            torch.equal(now, before) for of_now, entries in kept for now, before in zip(of_now, entries, strict=True)
        )


class Merging:
    """The part of `SmoaLayer` that writes to the base weight."""

    pristine: Pristine | None = None
    """Set while adapters are merged."""
    losses: list[Loss] | None = None
    """Where a merge appends what was lost of each matrix while `smoa.tuner.merged.losses_reported` is open."""
    shares_weight = False
    """Whether another module uses the base layer's weight. A merge then gives the base layer a weight of its own."""
    twins: tuple[Merging, ...] = ()
    """Adapted layers of the same weight, which have equal adapters."""
    weight_name = "weight"
    """Name of the weight in the base layer."""

    @property
    def is_computed(self: Any) -> bool:
        """Whether the weight became computed from others since injection, which refuses such a one: what is written to
        it is lost."""
        base = self.get_base_layer()
        by_hooks = {f"{self.weight_name}_g", f"{self.weight_name}_orig"} & base._parameters.keys()
        is_parametrized = self.weight_name in getattr(base, "parametrizations", ())
        return self.weight_name not in base._parameters and bool(by_hooks or is_parametrized)

    def check_unmerge(self) -> None:
        """Raise MergeError if undoing a merge would be lost."""
        if self.is_computed:
            raise MergeError(
                "its weight, into which adapters are merged, is computed from others since, so what undoing the merge "
                "writes would be lost; give the layer that weight back as a parameter, or load the model again"
            )

    def check_merge(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Raise MergeError if merging these adapters would be lost or, with `safe_merge`, would give NaN or infinite
        weights; changes nothing."""
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in self._present(chosen) if name not in self.merged_adapters]
        if not names:
            return
        if self.is_computed:
            raise MergeError(f"its weight is computed from others, so what a merge writes would be lost; {UNDO} first")
        if not safe_merge:
            return
        with torch.no_grad(), onloaded_for(self, names):
            for _, _, merged, _ in self.merged_matrices([*self.merged_adapters, *names]):
                if not torch.isfinite(merged).all():
                    # The first sentences are PEFT's, whose users may match them.
                    raise MergeError(
                        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken, "
                        f"or overflows {merged.dtype}; nothing was merged. Train it again, or load the base model in "
                        "float32"
                    )

    @torch.no_grad()
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight W by `W + Σ ΔW`; for a stack, every W, one after the other.

        The diagonal blocks of W, 1/K of it, are kept on the CPU for `unmerge`.

        Args:
            safe_merge: Raise MergeError instead of writing NaN or infinite weights.
            adapter_names: Adapters to add to those that are merged already; None means the active ones.

        Raises:
            MergeError: `safe_merge` found NaN or infinite weights, or the weight is computed from others (weight or
                spectral normalization, pruning); nothing was merged.
            UnsupportedModuleError: ZeRO-3 would drop the merged weight.
            RuntimeError: no memory, for example; no adapter of the layer is merged then.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        self.check_merge(names, safe_merge)
        refuse_writing(self.stored_weight())
        with onloaded_for(self, names, written=True), writing(self.stored_weight()):
            chosen = [*self.merged_adapters, *names]
            try:
                if (twin := self._merged_twin(chosen)) is not None:
                    self.pristine, self.merged_adapters[:] = twin.pristine, chosen
                    return
                for number, pristine, merged, updates in self.merged_matrices(chosen):
                    if self.losses is not None and self.quantization_backend is None:
                        self.losses.append(loss_of(pristine, merged, updates))
                    self._write_merged(number, pristine, merged, updates[-len(names) :])
                    if self.losses is not None and self.quantization_backend is not None:  # quantized again
                        self.losses.append(loss_of(pristine, self.base_weight(number), updates))
            except BaseException:
                self.merged_adapters[:] = chosen  # until all is restored, which may fail too
                self._restore_pristine()
                self.merged_adapters.clear()
                raise
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self: Any) -> None:
        """Restore the pristine weight, bit for bit.

        Raises:
            MergeError: the weight is computed from others since the merge; the adapters stay merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_unmerge()
        refuse_writing(self.stored_weight())
        with onloaded_for(self, [], written=True), writing(self.stored_weight()):
            self._restore_pristine()
        self.merged_adapters.clear()

    def merged_matrices(self: Any, adapter_names: list[str]) -> Iterator[tuple[int, Tensor, Tensor, list[Update]]]:
        """Number, pristine W, `W + Σ ΔW`, rounded once, and the update of each adapter, of one matrix after the other.

        W + Σ ΔW is formed in the pieces that training multiplies with, so that no matrix is held but the merged one.
        """
        self.derive()
        of_adapters = [self.updates(name) for name in adapter_names]
        for number, *updates in zip(range(self.matrix_count or 1), *of_adapters, strict=True):
            pristine = self.pristine_matrix(number)
            merged = torch.empty_like(pristine)
            for rows, effective in Effective(pristine, *updates, transposed=self.fan_in_fan_out).rows():
                # -0 + 0 is 0, inf + 0·inf is no number, and `unmerge` restores diagonal blocks only
                own = pristine[rows]
                merged[rows] = torch.where((effective == own) | own.isinf(), own, effective)
            yield number, pristine, merged, updates

    def _write_merged(self: Any, number: int, pristine: Tensor, merged: Tensor, updates: list[Update]) -> None:
        """Write a matrix with these updates. If other modules use it, the base layer gets one of its own until
        `unmerge`."""
        self.pristine = own = self.pristine or Pristine()
        for update in updates:
            own.keep(number, pristine, update.blocks)
        if self.shares_weight and own.replaced is None:
            base = self.get_base_layer()
            own.replaced = cast(nn.Parameter, base._parameters[self.weight_name])
            setattr(base, self.weight_name, nn.Parameter(self.stored_weight().clone(), requires_grad=False))
        try:
            self._write_matrix(merged, number)
        except RuntimeError:
            if own.is_in(self.base_weight(number), number):  # PyTorch refused to write, and would refuse to restore
                del own.blocks[number]
            raise

    def _restore_pristine(self: Any) -> None:
        """Write back what is kept, and only then forget it: if this fails, the layer is merged still."""
        if (own := self.pristine) is None:  # a merge failed before it wrote
            return
        if own.replaced is not None:
            setattr(self.get_base_layer(), self.weight_name, own.replaced)
        else:
            for number in own.blocks:
                matrix = self.base_weight(number)
                own.write_to(matrix, number)
                self._write_matrix(matrix, number)
        self.pristine = None

    def _merged_twin(self: Any, adapter_names: list[str]) -> Any:
        """A layer of the same weight, in one memory with this one's, that has these adapters merged."""
        own = weight_id(self.stored_weight())
        merged = (twin for twin in self.twins if twin.pristine is not None and twin.merged_adapters == adapter_names)
        return next((twin for twin in merged if weight_id(twin.stored_weight()) == own), None)

    def _write_matrix(self: Any, matrix: Tensor, number: int) -> None:
        """Overwrite one of the layer's weights by `matrix` (out_features, in_features), unless that is a view of it."""
        stored = self.stored_weight()
        if matrix.data_ptr() != stored.data_ptr():
            stored.copy_(placed_like(stored, as_stored(matrix, stored.shape, self.fan_in_fan_out)))


def loss_of(pristine: Tensor, written: Tensor, updates: list[Update]) -> Loss:
    """What a merge made of these updates in a matrix, a few rows at a time."""
    deltas = [delta_of(update, pristine) for update in updates]
    error = size = kept = 0.0
    for start in range(0, len(pristine), LOSS_ROWS):
        rows = slice(start, start + LOSS_ROWS)
        delta: Any = sum(form(rows) for form in deltas)
        added = written[rows].to(delta.dtype) - pristine[rows]
        error, size = error + float((added - delta).square().sum()), size + float(delta.square().sum())
        kept += float((added * delta).sum())
    return Loss(error**0.5, size**0.5, kept)


def weight_id(weight: Tensor) -> int:
    """The same for weights in one memory, which need not be one parameter: see `load_state_dict(assign=True)`."""
    return weight.data_ptr() or id(weight)  # 0 on the meta device


def as_matrix(stored: Tensor, fan_in_fan_out: bool) -> Tensor:
    """W (out_features, in_features) of a weight as stored: transposed in a Conv1D, with a kernel in a convolution."""
    return stored.T if fan_in_fan_out else stored.flatten(1)


def as_stored(matrix: Tensor, shape: Sequence[int], fan_in_fan_out: bool) -> Tensor:
    """The inverse of `as_matrix`, for a weight that is stored in `shape`."""
    return matrix.T if fan_in_fan_out else matrix.reshape(shape)
