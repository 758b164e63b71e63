"""Checks which modules can be adapted, and returns their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import PartitionError, UnsupportedModuleError
from smoa.layers.distributed import refuse_partitioned, whole
from smoa.layers.layer import SmoaLayer, linear_shape
from smoa.layers.quantized import dequantized, find_backend
from smoa.maths.blocks import check_num_blocks

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

SUPPORTED = (
    "torch.nn.Linear, transformers.pytorch_utils.Conv1D, quantized linear layers of bitsandbytes, torchao and HQQ"
)


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside an adapted module, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def weight_of(module: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    """A target's whole weight as floating-point numbers, before any merge."""
    if isinstance(module, SmoaLayer):
        return whole(module.pristine_weight())
    base: Any = base_of(module)
    return whole(refuse_partitioned(base.weight)) if backend is None else dequantized(backend, base)


def check_target(name: str, module: nn.Module, config: SmoaConfig, model: nn.Module) -> QuantizationBackend | None:
    """Return the backend of a quantized module, None for a plain one.

    Raises:
        UnsupportedModuleError: SMoA can't adapt this kind of module.
        PartitionError: K is larger than a side of its weight.
    """
    base = base_of(module)
    try:
        backend = find_backend(base, model)
    except UnsupportedModuleError as error:
        raise UnsupportedModuleError(f"{name}: {error}") from error
    if backend is None and not isinstance(base, (nn.Linear, Conv1D)):
        raise UnsupportedModuleError(
            f"{name}: SMoA can't adapt a {type(base).__module__}.{type(base).__qualname__}; supported are {SUPPORTED}; "
            "remove it from target_modules or add it to exclude_modules"
        )
    try:
        check_num_blocks(config.num_blocks_of(name), *linear_shape(base))
    except PartitionError as error:
        raise PartitionError(f"{name}: {error}") from None
    return backend
