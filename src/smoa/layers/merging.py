"""Merges adapters into a base weight and takes them out again, whether a layer holds one matrix or a stack of them."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from smoa.errors import MergeError
from smoa.layers.distributed import refuse_writing
from smoa.layers.layer import SmoaLayer


class MergingLayer(SmoaLayer):
    """A `SmoaLayer` whose adapters can be merged. Subclasses write the weight, and restore it."""

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise MergeError if merging these adapters gives NaN or infinite weights; changes nothing."""
        chosen = self.active_adapters if adapter_names is None else adapter_names
        self._check_merged([name for name in self._present(chosen) if name not in self.merged_adapters])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight W by `W + Σ ΔW`; for a stack, every W.

        The diagonal blocks of W, 1/K of it, are kept on the CPU for `unmerge`.

        Args:
            safe_merge: Raise MergeError instead of writing NaN or infinite weights.
            adapter_names: Adapters to add to those that are merged already; None means the active ones.

        Raises:
            MergeError: `safe_merge` found NaN or infinite weights; nothing was merged.
            UnsupportedModuleError: ZeRO-3 would drop the merged weight.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        refuse_writing(self.stored_weight())
        self._merge(names, safe_merge)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the pristine weight, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        refuse_writing(self.stored_weight())
        self._restore_pristine()
        self.merged_adapters.clear()

    def _check_merged(self, names: list[str]) -> None:
        raise NotImplementedError

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        raise NotImplementedError

    def _restore_pristine(self) -> None:
        raise NotImplementedError


def check_finite(merged: Tensor, names: list[str]) -> None:
    """Raise MergeError if a merged weight has NaN or infinite entries."""
    if not torch.isfinite(merged).all():
        # The first sentences are PEFT's, whose users may match them.
        raise MergeError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken, or overflows "
            f"{merged.dtype}; nothing was merged. Train it again, or load the base model in float32"
        )
