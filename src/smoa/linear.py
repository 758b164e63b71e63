"""SMoA on a linear layer: computes its output in one product, apart, or from what `generate` keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config import Shape
from smoa.distributed import gather, whole_shape
from smoa.kept import kept_output
from smoa.kernels.one_product import Update, pays
from smoa.layer import SmoaLayer
from smoa.mixed_batch import add_mixed
from smoa.route import Route, casts_alike, in_autocast_dtype, is_plain_linear, route_of


class Linear(SmoaLayer):
    """SMoA on a `torch.nn.Linear` or a transformers `Conv1D`.

    The output of a single active adapter is that of W + ΔW, formed in pieces, where this pays. Otherwise `x ΔWᵀ` is
    added to the base layer's.
    """

    @staticmethod
    def shape_of(base: nn.Module) -> Shape:
        """(out_features, in_features), also while the weight is sharded."""
        if isinstance(base, Conv1D):
            in_features, out_features = whole_shape(base, "weight")
            return out_features, in_features
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's converter knows this kind of layer."""
        return True

    keeps_blocks = True

    def branch_output(self, x: Tensor, adapter_name: str, route: Route | None = None) -> Tensor:
        """`x ΔWᵀ`, the adapter's contribution to the output; in training, dropout acts on x."""
        route = route or route_of(self, x, adapter_name)
        if route == "kept" and (kept := kept_output(self, in_autocast_dtype(x), adapter_name)) is not None:
            return kept
        gather(self, adapter_name)
        x = self.branch_input(x, adapter_name)
        update = self.update(adapter_name)
        return update.apply_to_few(x, self.pristine_weight()) if route == "shared" else self.apply_update(update, x)

    _add_mixed = add_mixed

    def apply_update(self, update: Update, x: Tensor) -> Tensor:
        """`x ΔWᵀ` of an update of this layer."""
        return update.apply(x, self.pristine_weight())

    def fits_one_product(self, x: Tensor, adapter_name: str) -> bool:
        """With M, and for many tokens; in a compiled model where gradients are enabled, whatever their number."""
        own = self.adapters[adapter_name]
        if torch.compiler.is_compiling():
            takes_one = torch.is_grad_enabled()
        else:
            tokens, contiguous = x.shape[:-1].numel(), lambda: self.blocks(adapter_name).is_contiguous
            takes_one = pays(len(own.ranks), tokens, contiguous, x.device.type)
        return takes_one and own.modulation != "none" and self.multiplies_plainly(x)

    def multiplies_plainly(self, x: Tensor) -> bool:
        """Whether the base layer's output is a product with its weight that nobody else sees, nor has."""
        return is_plain_linear(self.base_layer) and casts_alike(x, self.stored_weight())

    def in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        """`x(W + ΔW)ᵀ + b`."""
        base: Any = self.get_base_layer()
        x = in_autocast_dtype(x)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return self.update(adapter_name).apply_with_base(x, self.base_weight(), bias, self.fan_in_fan_out)
