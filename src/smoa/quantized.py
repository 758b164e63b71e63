"""SMoA on layers quantized by bitsandbytes (4 and 8 bits), torchao or HQQ.

PEFT's quantization backends read and write the weights. The quantized layer computes the base product itself, and
`x ΔWᵀ` is added to it. ΔW is anchored on the dequantized weight, which is computed whenever it is needed, in the
backward too, and never kept.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from smoa.compat import find_quantization_backend
from smoa.errors import UnsupportedModuleError
from smoa.kernels.one_product import Update
from smoa.linear import Linear
from smoa.merging import Pristine
from smoa.route import is_instrumented

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_backend(
    base: nn.Module, model: nn.Module, classes: tuple[type[nn.Module], ...] = ()
) -> QuantizationBackend | None:
    """PEFT's backend for the quantized layer `base` of `model`, or None if `base` holds a plain weight; that of
    `classes` may be plain, or quantized by a library that keeps the class."""
    if type(base) in classes and _is_plain(base.weight):
        return None  # don't ask PEFT, which imports every quantization library that is installed
    backend = find_quantization_backend(base, model)
    unknown = backend is None and isinstance(base, classes) and not _is_plain(getattr(base, "weight", None))
    if unknown or (backend is not None and not backend.supports_merge):
        raise UnsupportedModuleError(
            f"SMoA can't adapt the quantized weight of a {type(base).__name__}, which PEFT can't dequantize: ΔW is "
            "relative to the weight; load the model with dequantize=True in its quantization config (FP8, MXFP4, "
            "compressed-tensors), or quantize it with bitsandbytes, torchao or HQQ"
        )
    return backend


def _is_plain(weight: Any) -> bool:
    """Whether the weight holds ordinary floating-point numbers, also while FSDP2 shards it."""
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return isinstance(weight, Tensor) and weight.dtype in PLAIN_DTYPES and not wrapped


def dequantized(backend: QuantizationBackend, base: nn.Module) -> Tensor:
    """The weight of `base` as floating-point numbers: (out_features, in_features)."""
    keep_unpacked(base)
    return backend.get_base_weight(base).detach()


def dequantized_for_product(base: Any, dtype: torch.dtype) -> Tensor:
    """The 4-bit weight of a layer of bitsandbytes as its own product has it: (out_features, in_features)."""
    import bitsandbytes

    state = base.weight.quant_state
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # from 0.50 on; before, the weight was rounded to its own dtype
        state = copy.copy(state)
        state.dtype = dtype
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(base.weight.data, state)
    return weight.to(dtype)


def keep_unpacked(base: Any) -> None:
    """Keep bitsandbytes from repacking the 4-bit weight of a layer, and unpack it if it was.

    On CPUs with AVX512-BF16 bitsandbytes repacks a weight when it is evaluated, and rounds its scales to bfloat16.
    Neither PEFT's dequantization nor a training step can read the result, and bitsandbytes' own way back, which
    `state_dict` takes, leaves the scales transposed or quantizes them anew. The scales are put back here as they were
    rounded, so that the layer keeps the weight that was evaluated.
    """
    if not getattr(base, "support_avx512bf16_for_cpu", False):
        return
    base.support_avx512bf16_for_cpu = False
    state = base.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.flatten().float()
        base.state_dict()  # unpacks the weight in place
        state.absmax, state.nested, state.state2, state.offset = scales, False, None, None


class QuantizedLinear(Linear):
    """SMoA on a linear layer with a quantized weight.

    `quantization_backend`, one of PEFT's, dequantizes the weight and quantizes it again. As in PEFT, a merged base
    layer holds W + ΔW, quantized again. The original layer is kept for `unmerge`, which takes half a byte or one byte
    for each entry of W.
    """

    quantization_backend: QuantizationBackend
    generation_cache = "off"

    def stored_weight(self) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.W_q if hasattr(base, "W_q") else base.weight  # HQQ's name
        return weight

    def base_weight(self, number: int = 0) -> Tensor:
        """The base layer's current weight, dequantized: (out_features, in_features)."""
        return dequantized(self.quantization_backend, self.get_base_layer())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW (out_features, in_features), as PEFT's backends return and take weights."""
        return self.delta(adapter)

    def pristine_matrix(self, number: int) -> Tensor:
        """The weight before any merge, dequantized: (out_features, in_features)."""
        return dequantized(self.quantization_backend, self._pristine_layer())

    def _pristine_layer(self) -> nn.Module:
        return self.get_base_layer() if self.pristine is None else cast(nn.Module, self.pristine.replaced)

    # Break the graph, so that a compiler can't decide to keep the dequantized weight.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply_update(self, update: Update, x: Tensor) -> Tensor:
        return update.apply(x, self.pristine_weight)

    def multiplies_plainly(self, x: Tensor) -> bool:
        """Whether the base layer multiplies with its dequantized weight, as bitsandbytes does in 4 bits: others, and 8
        bits, quantize x too."""
        base: Any = self.base_layer
        if self.quantization_backend.backend_name != "bnb 4bit" or is_instrumented(base):
            return False
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        casts = torch.is_autocast_enabled(x.device.type)
        return type(base).__module__.startswith("bitsandbytes.") and not (
            casts and torch.get_autocast_dtype(x.device.type) != base.compute_dtype
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as above
    def in_one_product(self, x: Tensor, adapter_name: str) -> Tensor:
        base: Any = self.base_layer
        keep_unpacked(base)
        dtype = base.compute_dtype or x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        weight = partial(dequantized_for_product, base, dtype)
        return self.update(adapter_name).apply_with_base(x.to(dtype), weight, bias).to(x.dtype)

    def _write_merged(self, number: int, pristine: Tensor, merged: Tensor, updates: list[Update]) -> None:
        if self.pristine is None:
            self.pristine = Pristine(replaced=self.base_layer)
            if not hasattr(self.base_layer, "W_q"):  # HQQ's layer is replaced by a new one
                self.base_layer = copy.deepcopy(self.base_layer)
                copied: Any = getattr(self.base_layer, "weight", None)
                if hasattr(copied, "module"):  # a 4-bit weight still writes its statistics to the original layer
                    copied.module = self.base_layer
        self.quantization_backend.set_base_weight(self, merged)
        base: Any = self.get_base_layer()
        base.bias = self._pristine_layer().bias  # the same parameter; PEFT drops it with HQQ

    def _restore_pristine(self) -> None:
        device = self.stored_weight().device
        self.base_layer = self._pristine_layer().train(self.training)
        if self.stored_weight().device != device:  # the model was moved while merged
            self.base_layer.to(device)
        self.pristine = None
