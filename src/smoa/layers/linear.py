"""SMoA on a linear layer: computes its output in one product, apart, or from what `generate` keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config import Shape
from smoa.layers.distributed import gather
from smoa.layers.kept import KeptUpdate, Snapshot, open_snapshot
from smoa.layers.layer import SmoaLayer, casts_alike, in_autocast_dtype, is_plain_linear
from smoa.layers.mixed_batch import add_mixed, shared_output
from smoa.maths.kernels.autograd import is_transformed, only_values
from smoa.maths.kernels.one_product import may_form, pays
from smoa.maths.kernels.shared import prefers_shared
from smoa.maths.update import Update


class Linear(SmoaLayer):
    """SMoA on a `torch.nn.Linear` or a transformers `Conv1D`.

    The output of a single active adapter is that of W + ΔW, formed in pieces, where this pays. Otherwise `x ΔWᵀ` is
    added to the base layer's.
    """

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_features, in_features), also while the weight is sharded."""
        if isinstance(base, Conv1D):
            shape = getattr(base.weight, "ds_shape", base.weight.shape)
            return shape[1], shape[0]
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's converter knows this kind of layer."""
        return True

    def _active_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Any:
        if active and (snapshot := open_snapshot(self, active, x)) is not None:
            result = self.base_layer(x, *args, **kwargs)
            x = in_autocast_dtype(x.to(result.device))
            for name in active:
                kept = self._kept_update(snapshot, name, x)
                result = result + (self.branch_output(x, name) if kept is None else kept.apply(x)).to(result.dtype)
            return result
        if len(active) == 1 and self._takes_one_product(x, active[0]):
            return self._in_one_product(x, active[0])
        return super()._active_forward(x, active, *args, **kwargs)

    def branch_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x ΔWᵀ`, the adapter's contribution to the output; in training, dropout acts on x."""
        self.decide_partition(adapter_name)
        gather(self, adapter_name)
        x, own = self.branch_input(x, adapter_name), self.adapters[adapter_name]
        if own.modulation != "none" and only_values(x) and prefers_shared(max(own.ranks), x.shape[:-1].numel()):
            return shared_output(self, x, adapter_name)  # of few tokens
        return self.apply_update(self.update(adapter_name), x)

    _add_mixed = add_mixed

    def _kept_update(self, snapshot: Snapshot, adapter_name: str, x: Tensor) -> KeptUpdate | None:
        """The blocks of ΔW that `snapshot` keeps; None without M, where the factors are as quick, or without memory."""
        own = self.adapters[adapter_name]
        if own.modulation == "none":
            return None
        weight = self.pristine_weight
        return snapshot.get((self, own, x.dtype), lambda: KeptUpdate.of(self.update(adapter_name), weight(), x.dtype))

    def apply_update(self, update: Update, x: Tensor) -> Tensor:
        """`x ΔWᵀ` of an update of this layer."""
        return update.apply(x, self.pristine_weight())

    def _takes_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """Whether `x(W + ΔW)ᵀ + b` can be computed in one product, and is to be."""
        weight, dropout = self.stored_weight(), self.smoa_dropout[adapter_name]
        if self.adapters[adapter_name].modulation == "none" or (isinstance(dropout, nn.Dropout) and self.training):
            return False
        if not self._multiplies_plainly(x) or weight.requires_grad or is_transformed(x, weight):
            return False
        if torch.compiler.is_compiling():
            return torch.is_grad_enabled() and may_form(x.device.type)
        return pays(self.blocks(adapter_name), x.device.type, x.shape[:-1].numel())

    def _multiplies_plainly(self, x: Tensor) -> bool:
        """Whether the base layer's output is a product with its weight that nobody else sees, nor has."""
        return is_plain_linear(self.base_layer) and casts_alike(x, self.stored_weight())

    def _in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        base: Any = self.get_base_layer()
        x = in_autocast_dtype(x)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return self.update(adapter_name).apply_with_base(x, self.base_weight(), bias, self.fan_in_fan_out)
