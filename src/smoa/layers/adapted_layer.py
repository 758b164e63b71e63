"""An adapted layer as a module, whatever its kind: forward, mixed batches, merge and unmerge.

A kind of layer adds `shape_of`, which says what its matrix W is, and `branch_output`, which applies ΔW to an input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from smoa.config.adapter_config import SmoaConfig
from smoa.layers.adapter_module import AdapterModule
from smoa.layers.distributed import gather_for, onloaded
from smoa.layers.layer import SmoaLayer
from smoa.layers.merging import MergingLayer, check_finite
from smoa.layers.undo import DiagonalBlocks
from smoa.layers.weight_cache import BLOCKS

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend


class AdaptedLayer(AdapterModule, MergingLayer):
    """Adds `Σ x ΔWᵀ` of the active adapters to the base layer's output."""

    shares_weight = False
    """Whether another module uses the base layer's weight. A merge then gives the base layer a weight of its own."""
    read_by_models: tuple[str, ...] = ()
    """Attributes of the base layer that models read, as Whisper reads the strides of its convolutions."""

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
        self._active_adapter = adapter_name
        self._shared_weight: tuple[nn.Parameter, ...] = ()  # a parameter in a tuple is not saved with the layer
        self.update_layer(adapter_name, config, module, defer_partition=defer_partition)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).read_by_models:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    @classmethod
    def refusal(cls, base: nn.Module) -> str | None:
        """Why such a base layer can't be adapted although its class can, and what to do; None if it can."""
        return None

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """What the adapter adds to the base layer's output for the input x."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base layer's output plus that of the active adapters; `adapter_names` selects one for each sample."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [] if self.merged else self._present(self.active_adapters)
        for name in active:
            self.decide_partition(name)
        return self._active_forward(x, active, *args, **kwargs)

    def _active_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Any:
        result = self.base_layer(x, *args, **kwargs)
        with self._onloaded(active):
            for name in active:
                result = result + self.branch_output(x.to(result.device), name).to(result.dtype)
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for {len(x)} samples; give one for each")
        if self.merged:
            raise ValueError("adapter_names can't be used while adapters are merged; call unmerge_adapter first")
        names = self._present(sorted(set(adapter_names)))
        if (cache := self.open_cache(names, x)) is not None:
            cache.retain(BLOCKS, names)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        x = x.to(result.device)
        with self._onloaded(names):
            for name in names:
                chosen = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result = result.index_add(0, chosen, self.branch_output(x[chosen], name).to(result.dtype))
        return result

    def _onloaded(self, adapter_names: list[str]) -> AbstractContextManager[None]:
        """Load what a branch reads, if accelerate has offloaded it. The base layer's own call does not keep it."""
        base = self.get_base_layer()
        if torch.compiler.is_compiling() or "_hf_hook" not in base.__dict__:
            return nullcontext()
        factors = [part[name] for part in (self.smoa_A, self.smoa_B) for name in adapter_names]
        return onloaded([base, *self._saved_buffers(), *factors])

    def gather(self, adapter_name: str) -> None:
        """Gather weight and factors, which this layer reads without calling their modules, if ZeRO-3 splits them."""
        if hasattr(self, "ds_id"):  # ZeRO-3 knows this layer
            factors = (self.smoa_A[adapter_name], self.smoa_B[adapter_name])
            gather_for(self, [self.stored_weight(), *(p for factor in factors for p in factor.parameters())])

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """`W + Σ ΔW` of the named adapters on the pristine W, rounded once: (out_features, in_features)."""
        pristine = self.pristine_weight()
        total = sum((self.delta(name) for name in adapter_names), torch.zeros((), device=pristine.device))
        # Keep the exact bits where nothing is added: -0 + 0 is 0, and `unmerge` restores diagonal blocks only.
        return torch.where(total == 0, pristine, (total + pristine).to(pristine.dtype))

    def _check_merged(self, names: list[str]) -> None:
        check_finite(self.merged_weight([*self.merged_adapters, *names]), names)

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        merged = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge:
            check_finite(merged, names)
        self._write_merged(merged, names)

    def _write_merged(self, merged: Tensor, names: list[str]) -> None:
        """Write the weight. If other modules use it, the base layer gets one of its own until `unmerge`."""
        pristine, base = self.pristine_weight(), self.get_base_layer()
        for name in names:
            if name not in self._pristine_blocks:  # where a layer of the same weight has kept them
                self._pristine_blocks[name] = DiagonalBlocks.read_from(pristine, self.blocks(name))
        if self.shares_weight and not self._shared_weight:
            self._shared_weight = (cast(nn.Parameter, base.weight),)
            base.weight = nn.Parameter(self.stored_weight().clone(), requires_grad=False)
        self.write_weight(merged)

    def _restore_pristine(self) -> None:
        if self._shared_weight:
            self.get_base_layer().weight, self._shared_weight = self._shared_weight[0], ()
        else:
            weight = self.base_weight()
            for blocks in self._pristine_blocks.values():
                blocks.write_to(weight)
            self.write_weight(weight)
        self._pristine_blocks.clear()

    def __repr__(self) -> str:
        return f"smoa.{super().__repr__()}"


def is_instrumented(module: nn.Module) -> bool:
    """Whether a forward hook or a replaced forward (as in accelerate's offloading) must see the base layer's call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
