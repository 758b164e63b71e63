"""SMoA on a linear layer: forward, merge and unmerge."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import MergeError
from smoa.layers.distributed import gather_for, localise_labels, refuse_writing, replicate_labels
from smoa.layers.layer import SmoaLayer
from smoa.layers.undo import DiagonalBlocks
from smoa.layers.weight_cache import SortedBlocks, WeightCache, tensor_state
from smoa.maths.autograd import fused_linear, hadamard_branch, multiplies_exactly
from smoa.maths.modulation import plain_branch

FUSED_MIN_TOKENS = 64
APART_MIN_BLOCKS = 8
"""Without gradients, fewer tokens on many blocks cost less apart than forming W + ΔW (docs/experiment-log.md)."""


class Linear(nn.Module, SmoaLayer):
    """SMoA on a `torch.nn.Linear` or a transformers `Conv1D`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SmoaConfig,
        ranks: tuple[int, ...],
        alpha: float,
        fan_in_fan_out: bool = False,
        defer_partition: bool = False,
        backend: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        SmoaLayer.__init__(self, base_layer, fan_in_fan_out, backend)
        self.register_state_dict_post_hook(replicate_labels)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(localise_labels)  # type: ignore[no-untyped-call]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, ranks, alpha, defer_partition=defer_partition)

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """`W + Σ ΔW` of the named adapters on the pristine W, rounded once, (out_features, in_features)."""
        pristine = self.pristine_weight()
        total = sum((self.delta(name) for name in adapter_names), torch.zeros((), device=pristine.device))
        # Where nothing is added the very bits stay: -0 + 0 would be 0, and `unmerge` puts back diagonal blocks only.
        return torch.where(total == 0, pristine, (total + pristine).to(pristine.dtype))

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise MergeError if merging these adapters gives NaN or infinite weights; changes nothing."""
        chosen = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in self._present(chosen) if name not in self.merged_adapters]
        _check_finite(self.merged_weight([*self.merged_adapters, *names]), names)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by `W + Σ ΔW`, keeping W's diagonal blocks (1/K of it) on the CPU for `unmerge`.

        Args:
            safe_merge: Raise MergeError instead of writing NaN or infinite weights.
            adapter_names: Adapters to merge besides those merged already; None means the active ones.
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
        partitions = [self.partition(name) for name in names]
        self._pristine_blocks += [DiagonalBlocks.read_from(pristine, partition) for partition in partitions]
        self.base_weight().copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the pristine weight back, bit for bit."""
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
        """`base_layer(x) + Σ x ΔWᵀ` of the active adapters; `adapter_names` picks one adapter for each sample."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [] if self.merged else self._present(self.active_adapters)
        for name in active:
            self.decide_partition(name)
        if active and self.smoa_weight_cache is not None and not torch.is_grad_enabled():
            return self._cached_forward(self.smoa_weight_cache, x, active, *args, **kwargs)
        if len(active) == 1 and self._can_fuse(x, active[0]):
            return self._fused_forward(x, active[0])
        result = self.base_layer(x, *args, **kwargs)
        for name in active:
            result = result + self.branch_output(x, name).to(result.dtype)
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names names {len(adapter_names)} adapters for {len(x)} inputs; give one each")
        if self.merged:
            raise ValueError("adapter_names can't be used while adapters are merged; call unmerge_adapter first")
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self._present(sorted(set(adapter_names))):
            chosen = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            result = result.index_add(0, chosen, self.branch_output(x[chosen], name).to(result.dtype))
        return result

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x ΔWᵀ`, the adapter's contribution to the output; dropout acts on x when training."""
        self.decide_partition(adapter_name)
        if hasattr(self, "ds_id"):  # ZeRO-3 knows this layer
            factors = (self.smoa_A[adapter_name], self.smoa_B[adapter_name])
            gather_for(self, [self.stored_weight(), *(p for factor in factors for p in factor.parameters())])
        x = self.smoa_dropout[adapter_name](x)
        A, B = self.factors(adapter_name)
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        layout, scaling = self.layout[adapter_name], self.scaling[adapter_name]
        if self.modulation[adapter_name] == "none":
            return plain_branch(self._cast_input_dtype(x, A.dtype), A, B, None, rows, cols, layout, scaling)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._hadamard_output(x, adapter_name)

    def _hadamard_output(self, x: Tensor, adapter_name: str) -> Tensor:
        A, B = self.factors(adapter_name)
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        layout, scaling = self.layout[adapter_name], self.scaling[adapter_name]
        weight = self.anchor(adapter_name)
        if weight.requires_grad or _is_transformed(x, A, B):
            return plain_branch(x, A, B, weight, rows, cols, layout, scaling)
        return hadamard_branch(x, A, B, weight, rows, cols, layout.ranks, scaling)

    def _cached_forward(self, cache: WeightCache, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        tensors = [t for n in active for t in (*self.factors(n), self.smoa_row_labels[n], self.smoa_col_labels[n])]
        scalings = [self.scaling[name] for name in active]
        whole = self._may_add_to_weight(x.device.type)
        key = (whole, *active, *scalings, *map(tensor_state, [self.stored_weight(), *tensors]))
        if cache.key != key:
            self._fill_cache(cache, active, whole)
            cache.key = key
        if cache.effective is not None:
            return nn.functional.linear(x, cache.effective, self.bias)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for blocks in cache.blocks:
            result = result + blocks.output(x.to(blocks.blocks[0].dtype)).to(result.dtype)
        return result

    def _fill_cache(self, cache: WeightCache, active: list[str], whole: bool) -> None:
        cache.clear()
        if whole:
            cache.effective = self.merged_weight(active)
            return
        weight = self.base_weight()
        for name in active:
            rows, cols = self.smoa_row_labels[name], self.smoa_col_labels[name]
            slices = list(zip(self.layout[name].row_slices(), self.layout[name].col_slices(), strict=True))
            cache.blocks.append(SortedBlocks.of(self.delta(name).to(weight.dtype), rows, cols, slices))

    def _has_plain_base(self) -> bool:
        """Whether the base layer computes `x Wᵀ + b` of a plain weight and nothing else."""
        return type(self.base_layer) in (nn.Linear, Conv1D)

    def _may_add_to_weight(self, device_type: str) -> bool:
        """Whether `x (W + ΔW)ᵀ` keeps a small ΔW: in a half's 8 bits of mantissa, or TF32's 10, it would be lost."""
        if not self._has_plain_base() or torch.is_autocast_enabled(device_type):
            return False
        dtype = self.stored_weight().dtype
        return dtype == torch.float64 or (dtype == torch.float32 and multiplies_exactly(device_type))

    def _can_fuse(self, x: Tensor, adapter_name: str) -> bool:
        if not self._may_add_to_weight(x.device.type) or _is_instrumented(self.base_layer):
            return False
        dropout = self.smoa_dropout[adapter_name]
        if self.modulation[adapter_name] != "hadamard" or (isinstance(dropout, nn.Dropout) and self.training):
            return False
        weight = self.stored_weight()
        if weight.dtype != x.dtype or weight.requires_grad:
            return False
        if _is_transformed(x, *self.factors(adapter_name)):
            return False
        few_blocks = self.layout[adapter_name].num_blocks < APART_MIN_BLOCKS
        return torch.is_grad_enabled() or few_blocks or x.shape[:-1].numel() >= FUSED_MIN_TOKENS

    def _fused_forward(self, x: Tensor, adapter_name: str) -> Tensor:
        A, B = (factor.to(x.dtype) for factor in self.factors(adapter_name))
        rows, cols = self.smoa_row_labels[adapter_name], self.smoa_col_labels[adapter_name]
        ranks, scaling = self.layout[adapter_name].ranks, self.scaling[adapter_name]
        return fused_linear(x, A, B, self.base_weight(), self.bias, rows, cols, ranks, scaling)

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"


def _check_finite(merged: Tensor, names: list[str]) -> None:
    if not torch.isfinite(merged).all():
        raise MergeError(
            f"merging {', '.join(names)} gives NaN or infinite weights; the adapter is broken or overflows "
            f"{merged.dtype}, nothing was merged"
        )


def _is_instrumented(module: nn.Module) -> bool:
    """True when a forward hook or a replaced forward (as accelerate's offloading) must see the base layer's call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _is_transformed(*tensors: Tensor) -> bool:
    """True inside `torch.func` transforms, which don't reach into custom operators."""
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
