"""Adapters in several processes: one partition for all, and sharded parameters.

Two processes may round a decomposition differently. So only rank 0 decomposes a weight, and broadcasts its labels.

DeepSpeed's ZeRO-3 gathers a parameter when its own module is called, or when it is read inside the engine's forward. An
adapted layer reads its base weight and factors without calling their modules. Outside the engine's forward, as in
`generate`, the layer gathers them itself. accelerate's offloading, too, loads a parameter when its own module is
called, so the layer itself loads those that it reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import named_module_tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smoa.kernels.autograd import without_autocast

T = TypeVar("T")


def awaits_process_group() -> bool:
    """Whether this is one of several processes of torchrun or accelerate that have no process group yet."""
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return launched and dist.is_available() and not dist.is_initialized()


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Rank 0's `compute()` on every rank. Every rank must call this."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return compute()
    outcome: list[Any] = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]  # type: ignore[no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, or else the tensor itself. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(sharded: Tensor, tensor: Tensor) -> Tensor:
    """The tensor as a DTensor that is sharded as another one, unless that is none. Every rank must call this."""
    if not isinstance(sharded, DTensor):
        return tensor
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)


def whole_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of the parameter `name` of `module`, also while ZeRO-3 has partitioned it."""
    parameter = getattr(module, name)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather(layer: Any, *adapter_names: str) -> None:
    """Gather weight and factors, which an adapted layer reads without calling their modules, for its forward and
    backward, if ZeRO-3 partitions them. Every rank must call this."""
    if "ds_id" not in layer.__dict__:  # ZeRO-3 knows the layer
        return
    factors = [part[name] for part in (layer.smoa_A, layer.smoa_B) for name in adapter_names]
    parameters = [layer.stored_weight(), *(p for factor in factors for p in factor.parameters())]
    for parameter in parameters:
        if hasattr(parameter, "ds_id") and not parameter.numel():
            import deepspeed

            deepspeed.zero.register_external_parameter(layer, parameter)
            parameter.all_gather()


def onloaded_for(layer: Any, adapter_names: Iterable[str], written: bool = False) -> AbstractContextManager[None]:
    """Load what a branch of an adapted layer reads, or a merge writes, if accelerate has offloaded it. The base layer's
    own call does not keep it."""
    base = layer.get_base_layer()
    if torch.compiler.is_compiling() or "_hf_hook" not in base.__dict__:
        return nullcontext()
    factors = [part[name] for part in (layer.smoa_A, layer.smoa_B) for name in adapter_names]
    return onloaded([base, *factors], base if written else None)


@contextmanager
def onloaded(modules: Iterable[nn.Module], written: nn.Module | None = None) -> Iterator[None]:
    """Load what accelerate has offloaded of these modules, which it does by itself only when they are called. The
    weights of `written` are offloaded as they are in the end."""
    with ExitStack() as offloaded:
        for module in modules:
            hook, own = module.__dict__.get("_hf_hook"), (*module._parameters.values(), *module._buffers.values())
            if hook is not None and any(tensor is not None and tensor.is_meta for tensor in own):
                hook.pre_forward(module)
                offloaded.callback(hook.post_forward, module, None)
        yield
        hook = None if written is None else written.__dict__.get("_hf_hook")
        if hook and getattr(hook, "offload", False):  # as PEFT does, but not in a forward, nor for nested wrappers
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in named_module_tensors(written)}


def linear_weight(linear: nn.Module) -> Tensor:
    """Weight of a bias-free Linear, computed by its forward if a wrapper (FSDP) gathers the weight only there."""
    if type(linear) is nn.Linear:
        return whole(linear.weight)
    weight = next(linear.parameters())
    dtype = getattr(getattr(linear, "mixed_precision", None), "param_dtype", None) or weight.dtype  # FSDP1's
    with without_autocast(weight.device.type):  # it would round the factors
        output: Tensor = linear(torch.eye(int(linear.in_features), device=weight.device, dtype=dtype))  # type: ignore[arg-type]
    return output.T


def why_not_plain(layer: Any) -> str | None:
    """What an adapted layer's weight is, if it isn't a plain one in this process's memory."""
    weight, base = layer.stored_weight(), layer.get_base_layer()
    if weight.is_meta:
        return "offloaded"
    # FSDP1 leaves a flat part of it, or no parameter; ZeRO-3 may leave it whole, but replaces it in every step
    is_flat = weight.ndim < 2 or not weight.numel() or next(base.parameters(), None) is None
    if is_flat or isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
        return "sharded over processes"
    return None if layer.quantization_backend is None else "quantized"
