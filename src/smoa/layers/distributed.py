"""What several processes must agree on: a partition, which two of them may round differently.

So rank 0 alone decomposes a weight, and its labels are broadcast. Once FSDP2 has sharded a layer, its state dict shows
the labels as tensors replicated over the mesh: accelerate expects nothing but DTensors there.

DeepSpeed's ZeRO-3 gathers a parameter when its own module is called, or anything reads it inside the engine's forward.
A layer reads its base weight and factors without calling their modules, so it gathers them by itself elsewhere, as in
`generate`. What is outside of any forward, such as a merge, finds empty tensors, or whole ones left over from a forward
that will be dropped with all that is written to them, and refuses both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from smoa.errors import SmoaError, UnsupportedModuleError

T = TypeVar("T")
LABELS = ("smoa_row_labels", "smoa_col_labels")
SCALE = "smoa_block_scale"
PARTITION = (*LABELS, SCALE)
GATHERED = "_ds_z3_gathered_param_context_depth"
"""What DeepSpeed 0.19 counts on a parameter while it is within GatheredParameters."""
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""In the names of modules inside FSDP1 and activation checkpointing, but not in the keys of their state dicts."""


def is_distributed() -> bool:
    """True in one of several processes with a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def awaits_process_group() -> bool:
    """True in one of several processes, as torchrun and accelerate start them, that have no process group yet."""
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return launched and dist.is_available() and not dist.is_initialized()


def from_rank_zero(compute: Callable[[], T], everywhere: bool = False) -> T:
    """`compute()` of rank 0, on every rank; every rank must call this, and computes too with `everywhere`.

    Raises:
        SmoaError: `compute` raised it on rank 0; it is raised on every rank, so that none waits for ever. Any other
            error of rank 0 is raised there, and the others raise a SmoaError that tells of it.
    """
    if not is_distributed():
        return compute()
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if everywhere or dist.get_rank() == 0:
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
    """The tensor itself, or all of one that is sharded or replicated over a mesh; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_partitioned(parameter: Tensor) -> bool:
    """True while ZeRO-3 has left the parameter without entries on this rank."""
    return parameter.numel() == 0 and hasattr(parameter, "ds_id")


def gather_for(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Gather what ZeRO-3 has partitioned until the forward of `module` ends, and in its backward; every rank must."""
    for parameter in filter(is_partitioned, parameters):
        import deepspeed

        deepspeed.zero.register_external_parameter(module, parameter)
        parameter.all_gather()  # type: ignore[attr-defined]


def refuse_partitioned(parameter: Tensor) -> Tensor:
    """The parameter itself, to be read.

    Raises:
        UnsupportedModuleError: ZeRO-3 has left it empty.
    """
    if is_partitioned(parameter):
        raise _needs_gathering(parameter)
    return parameter


def refuse_writing(parameter: Tensor) -> None:
    """Raise UnsupportedModuleError if ZeRO-3 would drop what is written to the parameter."""
    if hasattr(parameter, "ds_id") and not getattr(parameter, GATHERED, 0):
        raise _needs_gathering(parameter)


def _needs_gathering(parameter: Any) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"a weight of shape {tuple(parameter.ds_shape)} is partitioned by DeepSpeed ZeRO-3: outside of a forward pass "
        "it is empty, or loses what is written to it; on every rank call this within "
        "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
    )


def shown_partition(layer: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dict hook: exact block scales; all as replicated DTensors on the mesh of factors that FSDP2 shards."""
    for name, factor in layer.smoa_A.items():  # type: ignore[operator, union-attr]
        weight = next(factor.parameters())
        for key in (f"{prefix}{part}.{name}" for part in PARTITION):
            if key not in state_dict:
                continue
            local = state_dict[key]
            if key == f"{prefix}{SCALE}.{name}":
                layer.restore_scale(name)  # type: ignore[operator]
                local = layer.smoa_block_scale[name]  # type: ignore[index]
            if isinstance(weight, DTensor):
                placements = [Replicate()] * weight.device_mesh.ndim
                local = DTensor.from_local(local, weight.device_mesh, placements, run_check=False)
            state_dict[key] = local


def local_partition(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load state dict pre-hook: undoes what `shown_partition` did."""
    for key in state_dict:
        if key.startswith(tuple(f"{prefix}{part}." for part in PARTITION)):
            state_dict[key] = whole(state_dict[key])


def plain_name(name: str) -> str:
    """A module's name as state dicts have it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def with_plain_names(model: nn.Module) -> Any:
    """The model as PEFT asks it for names; PEFT 0.21 finds nothing to save inside wrappers, and saves nothing."""
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    return SimpleNamespace(named_modules=lambda: modules, state_dict=model.state_dict)
