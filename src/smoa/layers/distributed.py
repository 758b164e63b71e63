"""Adapters in several processes: one partition for all, and sharded parameters.

Two processes may round a decomposition differently. So only rank 0 decomposes a weight, and broadcasts its labels. Once
FSDP2 has sharded a layer, its state dict shows the labels as DTensors replicated over the mesh, because accelerate
expects only DTensors there.

DeepSpeed's ZeRO-3 gathers a parameter when its own module is called, or when it is read inside the engine's forward. An
adapted layer reads its base weight and factors without calling their modules. Outside the engine's forward, as in
`generate`, the layer gathers them itself. Outside any forward, as in a merge, a parameter is either empty or left over
from a forward, and in that case ZeRO-3 drops what is written to it. Both are refused. accelerate's offloading, too,
loads a parameter when its own module is called, so the layer itself loads those that it reads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import named_module_tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from smoa.errors import SmoaError, UnsupportedModuleError
from smoa.maths.blocks import as_labels
from smoa.maths.kernels.autograd import without_autocast

T = TypeVar("T")
LABELS = ("smoa_row_labels", "smoa_col_labels")
SCALE = "smoa_block_scale"
PARTITION = (*LABELS, SCALE)
GATHERED = "_ds_z3_gathered_param_context_depth"
"""Attribute in which DeepSpeed 0.19 counts the open GatheredParameters contexts of a parameter."""
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of module names inside FSDP1 and activation checkpointing, which the keys of state dicts do not have."""


def is_distributed() -> bool:
    """Whether this is one of several processes in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def awaits_process_group() -> bool:
    """Whether this is one of several processes of torchrun or accelerate that have no process group yet."""
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return launched and dist.is_available() and not dist.is_initialized()


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Return rank 0's `compute()` on every rank. Every rank must call this, and raises what rank 0 did (as a SmoaError
    that quotes it, where it was another error), so that none waits forever."""
    if not is_distributed():
        return compute()
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [compute()]
        except Exception as error:
            failure = error
            text = f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
            outcome = [error if isinstance(error, SmoaError) else SmoaError(text)]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], SmoaError):
        raise failure or outcome[0]
    result: T = outcome[0]
    return result


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, or else the tensor itself. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(sharded: Tensor, tensor: Tensor) -> Tensor:
    """The tensor as a DTensor that is sharded as another one, unless that is none. Every rank must call this."""
    if not isinstance(sharded, DTensor):
        return tensor
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has left the parameter empty on this rank."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


def gather(layer: Any, *adapter_names: str) -> None:
    """Gather weight and factors, which an adapted layer reads without calling their modules, for its forward and
    backward, if ZeRO-3 partitions them. Every rank must call this."""
    if "ds_id" not in layer.__dict__:  # ZeRO-3 knows the layer
        return
    factors = [part[name] for part in (layer.smoa_A, layer.smoa_B) for name in adapter_names]
    parameters = [layer.stored_weight(), *(p for factor in factors for p in factor.parameters())]
    for parameter in filter(is_partitioned, parameters):
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


def writing(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where PyTorch lets one write to the tensor, without gradients: one made in inference mode takes no other."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


def refuse_partitioned(parameter: Tensor) -> Tensor:
    """Return the parameter if it can be read."""
    if is_partitioned(parameter):
        raise _needs_gathering(parameter)
    return parameter


def linear_weight(linear: nn.Module) -> Tensor:
    """Weight of a bias-free Linear, computed by its forward if a wrapper (FSDP) gathers the weight only there."""
    if type(linear) is nn.Linear:
        return whole(refuse_partitioned(linear.weight))
    weight = next(linear.parameters())
    with without_autocast(weight.device.type):  # it would round the factors
        output: Tensor = linear(torch.eye(int(linear.in_features), device=weight.device, dtype=weight.dtype))  # type: ignore[arg-type]
    return output.T


def refuse_writing(*parameters: Tensor) -> None:
    """Raise UnsupportedModuleError if ZeRO-3 will drop what is written to one of the parameters."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id") and not getattr(parameter, GATHERED, 0):
            raise _needs_gathering(parameter)


def _needs_gathering(parameter: Any) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"a weight of shape {tuple(parameter.ds_shape)} is partitioned by DeepSpeed ZeRO-3: outside a forward pass "
        "it is empty, or loses what is written to it; on every rank, call this within "
        "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
    )


def partition_to_state_dict(layer: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dict hook: save exact block scales, and under FSDP2 save labels and scales as replicated DTensors."""
    for name, factor in layer.smoa_A.items():
        if (scale := state_dict.get(f"{prefix}{SCALE}.{name}")) is not None and scale.dtype != torch.float32:
            exact = layer.adapters[name].derived().block_scale.clone()  # FSDP1 casts buffers in place
            state_dict[f"{prefix}{SCALE}.{name}"] = exact
        if isinstance(weight := getattr(factor, "weight", None), DTensor):
            for key in {f"{prefix}{part}.{name}" for part in PARTITION} & state_dict.keys():
                placements = [Replicate()] * weight.device_mesh.ndim
                state_dict[key] = DTensor.from_local(state_dict[key], weight.device_mesh, placements, run_check=False)


def partition_from_state_dict(layer: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load state dict pre-hook: replace the DTensors of `partition_to_state_dict` by plain tensors, and averages of
    equal labels by these, which a copy into uint8 would cut. Warn of factors that come without their labels."""
    own = tuple(f"{prefix}{part}." for part in PARTITION)
    for key in state_dict:
        if key.startswith(own):
            state_dict[key] = whole(state_dict[key])
            if SCALE not in key:
                state_dict[key] = as_labels(state_dict[key])
    for name, adapter in layer.adapters.items():
        lacks = f"{prefix}smoa_A.{name}.weight" in state_dict and f"{prefix}{PARTITION[0]}.{name}" not in state_dict
        if lacks and adapter.kinds[0] != "contiguous":
            warnings.warn(
                "a state dict has factors and no labels of their blocks, which other base weights, or of "
                "random blocks another seed, make others; save buffers too: save_pretrained, or all of state_dict()",
                stacklevel=2,
            )


def plain_name(name: str) -> str:
    """The module's name as in the keys of state dicts."""
    if "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def why_not_plain(layer: Any) -> str | None:
    """What an adapted layer's weight is, if it isn't a plain one in this process's memory."""
    parameters = list(layer.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return "offloaded"
    # ZeRO-3 may have left a parameter whole (`ds_id`), but replaces it in every step
    whole = [p for p in parameters if p.numel() and not isinstance(p, DTensor) and not hasattr(p, "ds_id")]
    flat = any(p.ndim != 2 for factor in (layer.smoa_A, layer.smoa_B) for p in factor.parameters())  # FSDP1's shards
    if not parameters or len(whole) < len(parameters) or flat:
        return "sharded over processes"
    return None if layer.quantization_backend is None else "quantized"
