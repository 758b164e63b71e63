"""SMoA on a linear layer: forward, merge and unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import MergeError
from smoa.layers.distributed import gather_for, partition_from_state_dict, partition_to_state_dict, refuse_writing
from smoa.layers.layer import SmoaLayer
from smoa.layers.undo import DiagonalBlocks
from smoa.layers.weight_cache import BLOCKS, WHOLE, KeptUpdate, WeightCache
from smoa.maths.kernels.choice import prefers_apart
from smoa.maths.kernels.operators import is_transformed, multiplies_exactly
from smoa.maths.modulations import MODULATIONS
from smoa.maths.update import Update

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


class Linear(nn.Module, SmoaLayer):
    """SMoA on a `torch.nn.Linear` or a transformers `Conv1D`.

    `route` selects how a single active adapter is computed: "apart" adds `x ΔWᵀ` to the base layer's output, "fused"
    forms W + ΔW in chunks where that is exact, and "auto" takes the faster of the two.
    """

    route: Literal["auto", "fused", "apart"] = "auto"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SmoaConfig,
        module: str,
        fan_in_fan_out: bool = False,
        defer_partition: bool = False,
        backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        SmoaLayer.__init__(self, base_layer, fan_in_fan_out, backend)
        self.register_state_dict_post_hook(partition_to_state_dict)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(partition_from_state_dict)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_refresh_orders)  # type: ignore[no-untyped-call]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module, defer_partition=defer_partition)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self.exact_scales():  # `.half()`, `.to(dtype)` and others call this
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """`W + Σ ΔW` of the named adapters on the pristine W, rounded once: (out_features, in_features)."""
        pristine = self.pristine_weight()
        total = sum((self.delta(name) for name in adapter_names), torch.zeros((), device=pristine.device))
        # Keep the exact bits where nothing is added: -0 + 0 is 0, and `unmerge` restores diagonal blocks only.
        return torch.where(total == 0, pristine, (total + pristine).to(pristine.dtype))

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise MergeError if merging these adapters gives NaN or infinite weights; changes nothing."""
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in self._present(chosen) if name not in self.merged_adapters]
        _check_finite(self.merged_weight([*self.merged_adapters, *names]), names)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by `W + Σ ΔW`.

        W's diagonal blocks, 1/K of it, are kept on the CPU for `unmerge`.

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
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge:
            _check_finite(merged, names)
        self._write_merged(merged, names)
        self.merged_adapters.extend(names)

    def _write_merged(self, merged: Tensor, names: list[str]) -> None:
        pristine = self.pristine_weight()
        self._pristine_blocks += [DiagonalBlocks.read_from(pristine, self.blocks(name)) for name in names]
        self.base_weight().copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the pristine weight, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        refuse_writing(self.stored_weight())
        self._restore_pristine()
        self.merged_adapters.clear()

    def _restore_pristine(self) -> None:
        weight = self.base_weight()
        for blocks in self._pristine_blocks:
            blocks.write_to(weight)
        self._pristine_blocks.clear()

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """`base_layer(x) + Σ x ΔWᵀ` of the active adapters; `adapter_names` selects an adapter for each sample."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [] if self.merged else self._present(self.active_adapters)
        for name in active:
            self.decide_partition(name)
        if active and (cache := self.open_cache(active)) is not None:
            return self._cached_forward(cache, x, active, *args, **kwargs)
        if len(active) == 1 and self._can_fuse(x, active[0]):
            return self.update(active[0]).apply_with_base(x, self.base_weight(), self.bias)
        result = self.base_layer(x, *args, **kwargs)
        for name in active:
            result = result + self.branch_output(x, name).to(result.dtype)
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for {len(x)} samples; give one for each")
        if self.merged:
            raise ValueError("adapter_names can't be used while adapters are merged; call unmerge_adapter first")
        names = self._present(sorted(set(adapter_names)))
        if (cache := self.open_cache(names)) is not None:
            cache.retain(BLOCKS, names)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in names:
            chosen = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            result = result.index_add(0, chosen, self.branch_output(x[chosen], name).to(result.dtype))
        return result

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x ΔWᵀ`, the adapter's contribution to the output; in training, dropout acts on x."""
        self.decide_partition(adapter_name)
        if hasattr(self, "ds_id"):  # ZeRO-3 knows this layer
            factors = (self.smoa_A[adapter_name], self.smoa_B[adapter_name])
            gather_for(self, [self.stored_weight(), *(p for factor in factors for p in factor.parameters())])
        x, anchors = self.smoa_dropout[adapter_name](x), MODULATIONS[self.modulation[adapter_name]].anchors
        if not anchors:
            x = self._cast_input_dtype(x, self.factors(adapter_name)[0].dtype)
        elif torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        kept = self._kept_update(adapter_name, x.dtype) if anchors else None  # without M, the factors are as quick
        if kept is not None:
            return kept.apply(x)
        update = self.update(adapter_name)
        return self._apply_update(update, x)

    def _kept_update(self, adapter_name: str, dtype: torch.dtype) -> KeptUpdate | None:
        cache = self.open_cache([adapter_name])
        if cache is None:
            return None
        key = (dtype, *self.state_of_update([adapter_name]))
        make = partial(self._keep_update, adapter_name, dtype)
        return cache.get((BLOCKS, adapter_name), key, make)

    def _keep_update(self, adapter_name: str, dtype: torch.dtype) -> KeptUpdate:
        return KeptUpdate.of(self.update(adapter_name), self.pristine_weight(), dtype)

    def _apply_update(self, update: Update, x: Tensor) -> Tensor:
        return update.apply(x, self.pristine_weight())

    def _cached_forward(self, cache: WeightCache, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        whole = cache.whole and self._may_add_to_weight(x.device.type) and not _is_instrumented(self.base_layer)
        cache.retain(WHOLE if whole else BLOCKS, active)
        if whole:
            weight = cache.get((WHOLE, *active), self.state_of_update(active), lambda: self.merged_weight(active))
            if weight is not None:
                return nn.functional.linear(x, weight, self.bias)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in active:
            result = result + self.branch_output(x, name).to(result.dtype)
        return result

    def _has_plain_base(self) -> bool:
        """Whether the base layer computes `x Wᵀ + b` of a plain weight and nothing else."""
        return type(self.base_layer) in (nn.Linear, Conv1D)

    def _may_add_to_weight(self, device_type: str) -> bool:
        """Whether `x (W + ΔW)ᵀ` keeps a small ΔW, which 16-bit floats and TF32 would round away."""
        if not self._has_plain_base() or torch.is_autocast_enabled(device_type):
            return False
        dtype = self.stored_weight().dtype
        return dtype == torch.float64 or (dtype == torch.float32 and multiplies_exactly(device_type))

    def _can_fuse(self, x: Tensor, adapter_name: str) -> bool:
        if self.route == "apart" or not self._may_add_to_weight(x.device.type) or _is_instrumented(self.base_layer):
            return False
        dropout = self.smoa_dropout[adapter_name]
        by_weight = MODULATIONS[self.modulation[adapter_name]].by_weight
        if not by_weight or (isinstance(dropout, nn.Dropout) and self.training):
            return False
        weight = self.stored_weight()
        if weight.dtype != x.dtype or weight.requires_grad or is_transformed(x, *self.factors(adapter_name)):
            return False
        return self.route == "fused" or not prefers_apart(self.blocks(adapter_name), x.shape[:-1].numel())

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"


def _check_finite(merged: Tensor, names: list[str]) -> None:
    if not torch.isfinite(merged).all():
        # The first sentences are PEFT's, whose users may match them.
        raise MergeError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken, or overflows "
            f"{merged.dtype}; nothing was merged. Train it again, or load the base model in float32"
        )


def _is_instrumented(module: nn.Module) -> bool:
    """Whether a forward hook or a replaced forward (as in accelerate's offloading) must see the base layer's call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _refresh_orders(layer: nn.Module, incompatible_keys: object) -> None:
    """Load state dict post-hook: give a compiled model the orders of the loaded labels."""
    cast(Linear, layer).refresh_orders()
