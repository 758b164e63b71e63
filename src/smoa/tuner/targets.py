"""Finds and checks the layers and parameters to adapt, before the first one is replaced, and reports what to know."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from smoa.config import Shape, SmoaConfig, by_pattern
from smoa.errors import ConfigError, SmoaError, UnsupportedModuleError, first_of, named
from smoa.layers.distributed import awaits_process_group, from_rank_zero, whole
from smoa.layers.experts import ParamWrapper
from smoa.layers.kinds import KINDS, QUANTIZED, Kind, kind_and_backend
from smoa.layers.layer import SmoaLayer, around_adapters
from smoa.maths.blocks import check_num_blocks
from smoa.maths.layout import Layout, whole_shape
from smoa.maths.spectrum import finite_peak
from smoa.tuner.tying import refuse_training

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

SUPPORTED = ", ".join(kind.name for kind in (*KINDS, QUANTIZED))
EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""What the matrices of experts were called before transformers stacked them."""
ROUTERS = ("router", "gate")
"""Names of modules that choose the experts of each token."""
PIECE = (
    "tensor parallelism gives each process a piece of the weight, and blocks span all of it; load the model without "
    "tp_plan (FSDP works)"
)
_REPORTED: WeakSet[nn.Module] = WeakSet()
"""Models whose experts `_report_experts` has named."""


def survey_targets(
    model: nn.Module, peft_config: Any, is_target: Callable[[Any, str], object], loads_labels: bool
) -> dict[str, Target]:
    """Check all targets, fill the config's target_modules as PEFT does, and report what a user should know.

    Nothing of the model is changed. `is_target` says whether a config makes the module of a name a target. With
    `loads_labels` the partition is not made from the weights. Return what each target module is, by its name.
    """
    every_linear = str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    if not loads_labels:
        _report_experts(model, peft_config, every_linear, is_target)
    config: Any = _maybe_include_all_linear_layers(peft_config, model)
    if every_linear:
        _leave_out(config, model)
    refuse_training(model, config, is_target)
    problems, targets, shapes = list[SmoaError](), dict[str, Target](), dict[str, Shape]()
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for name, module in around_adapters(model):
        if name and "base_layer" not in name.split(".") and is_target(config, name):
            with _collected(problems):
                refuse_other_uses(name, module, model, uses[id(module)])
                targets[name] = check_target(name, module, config, model)
                shapes[name] = targets[name].shape
                if not loads_labels and targets[name].backend is None:
                    weight: Any = base_of(module).weight
                    _check_finite(name, weight, module if isinstance(module, SmoaLayer) else None)
    with _collected(problems):
        for key, owner in target_parameters(model, config):
            module_name, _, parameter_name = key.rpartition(".")
            with _collected(problems):
                if module_name in targets:
                    raise ConfigError(f"{key}: target_modules names its module too; name it in one of the two")
                module = model.get_submodule(module_name)
                refuse_other_uses(module_name, module, model, uses[id(module)])
                if _is_piece(owner):
                    raise UnsupportedModuleError(f"target_parameters: {key}: {PIECE}; leave it out")
                shapes[key] = check_parameter(key, owner, config)
                if not loads_labels:
                    _check_finite(key, getattr(owner, parameter_name), existing_wrapper(model, key))
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))
    if not loads_labels:
        _report_narrow(shapes, config)
        unmatched = [key for key in config.num_blocks_pattern if not any(by_pattern({key: key}, n, "") for n in shapes)]
        if unmatched:
            warnings.warn(f"num_blocks_pattern: {first_of(unmatched)} matches no target", stacklevel=2)
    return targets


@contextmanager
def _collected(problems: list[SmoaError]) -> Iterator[None]:
    try:
        yield
    except SmoaError as error:
        problems.append(error)


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside an adapted module, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class Target(NamedTuple):
    """What a module to adapt is: its kind, the shape of W, and the backend that dequantizes W, if it must be."""

    kind: Kind
    shape: Shape
    backend: QuantizationBackend | None


def check_target(name: str, module: nn.Module, config: SmoaConfig, model: nn.Module) -> Target:
    """What the module of a name is. Raises UnsupportedModuleError or PartitionError if it can't be adapted."""
    base = base_of(module)
    with named(name):
        kind, backend = kind_and_backend(base, model)
        if (reason := _refusal(name, base, kind, model)) is not None:
            raise UnsupportedModuleError(
                f"SMoA can't adapt a {type(base).__module__}.{type(base).__qualname__}; {reason}; "
                "remove it from target_modules or add it to exclude_modules"
            )
    assert kind is not None, "a layer of no kind was refused"
    shape = kind.layer_class.shape_of(base)
    check_fit(name, shape, config)
    return Target(kind, shape, backend)


def refuse_other_uses(name: str, module: nn.Module, model: nn.Module, uses: int) -> None:
    """Raise UnsupportedModuleError if another method has adapted a module, or the model has it at several places."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, SmoaLayer):
        raise UnsupportedModuleError(
            f"{name}: a {type(module).__module__}.{type(module).__name__} adapts it, and unmerging one adapter would "
            "take the other's part of the weight along; merge that one into the base first (merge_and_unload)"
        )
    if uses > 1:
        places = [path for path, each in model.named_modules(remove_duplicate=False) if each is module]
        raise UnsupportedModuleError(
            f"{name}: is one module at {first_of(places)}, of which PEFT adapts one, and a merge would change all; "
            "save and load the model, which makes modules of their own, or leave it out"
        )


def _refusal(name: str, base: nn.Module, kind: Kind | None, model: nn.Module) -> str | None:
    """Why a layer can't be adapted, or None: the one rule for named targets and for "all-linear"."""
    if kind is None:
        return f"supported are {SUPPORTED}"
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention uses its weight without calling it, so an adapter would do nothing"
    if _in_copy(name, model):
        return "an adapter has it in modules_to_save, where no save would find what is added to it"
    if _is_piece(base):
        return PIECE
    owner, _, own = name.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(base, nn.Conv1d) and _only_reads_weight(type(parent), own):
        return f"{type(parent).__name__} uses its weight without calling it, so an adapter would do nothing"
    if torch.backends.mha.get_fastpath_enabled() and isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "in evaluation a TransformerEncoderLayer uses its weight without calling it, unless you call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    return kind.refusal(base)


def _only_reads_weight(kind: type[nn.Module], name: str) -> bool:
    """Whether the code of a module takes the weight of a layer in it and never calls it or hands it on, as Mamba does
    with conv1d."""
    with suppress(OSError, TypeError):  # a class whose code is nowhere
        code = "".join(map(inspect.getsource, kind.__mro__[: kind.__mro__.index(nn.Module)]))
        uses = set(re.findall(rf"self\.{re.escape(name)}\b(?!\s*[=:])(\.\w+)?", code))
        return ".weight" in uses and uses.isdisjoint({"", ".forward"})
    return False


def _is_piece(module: nn.Module) -> bool:
    """Whether tensor parallelism has given each process a piece of a module's weights, with which alone it computes,
    and a forward or hooks that tell the others. FSDP2's pieces have the same type; it gathers them first."""
    if getattr(module, "_hf_tp_plan", None) is not None:  # of a transformers without DTensors
        return True
    weights = [each for each in module.parameters(recurse=False) if isinstance(each, DTensor)]
    if not any(place.is_shard() for each in weights for place in each.placements):
        return False
    from torch.distributed.fsdp import FSDPModule  # takes half as long to import as torch

    has_hooks = bool(module._forward_pre_hooks or module._forward_hooks) and not isinstance(module, FSDPModule)
    return "forward" in vars(module) or has_hooks


def _in_copy(name: str, model: nn.Module) -> bool:
    """Whether a module is one that another adapter has in `modules_to_save`, or its original."""
    owners = [name[:place] for place, letter in enumerate(name) if letter == "."]
    return any(isinstance(model.get_submodule(owner), ModulesToSaveWrapper) for owner in owners)


def _leave_out(config: SmoaConfig, model: nn.Module) -> None:
    """Take linear layers that can't be adapted, such as routers, out of the targets that "all-linear" has become."""
    left_out, told = set[str](), dict[str, list[str]]()
    for name in sorted(config.target_modules or ()):
        base = base_of(model.get_submodule(name))
        with suppress(UnsupportedModuleError):  # of a quantized weight, which `check_target` raises
            if (reason := _refusal(name, base, kind_and_backend(base, model)[0], model)) is not None:
                left_out.add(name)
                # nobody takes a projection of MultiheadAttention for a layer, nor a copy
                if not isinstance(base, NonDynamicallyQuantizableLinear) and not _in_copy(name, model):
                    told.setdefault(reason, []).append(name)
    config.target_modules = set(config.target_modules or []) - left_out  # type: ignore[assignment]
    if told:
        reasons = "; ".join(f"{first_of(names)}: {reason}" for reason, names in told.items())
        warnings.warn(f"target_modules='all-linear' leaves out {reasons}", stacklevel=2)


def _check_finite(name: str, stored: Tensor, layer: SmoaLayer | None) -> None:
    """Raise PartitionError if a weight, which `layer` may have merged, is not finite. Every rank must call this."""
    if awaits_process_group():  # weights of other ranks may not be loaded
        return
    with gather_params_ctx(stored):  # for DeepSpeed ZeRO-3
        weight = None if stored.is_meta else whole(stored if layer is None else layer.pristine_weight())
        with named(name):
            from_rank_zero(lambda: None if weight is None else float(finite_peak(weight)))


# Parameters of experts.


def existing_wrapper(model: nn.Module, key: str) -> ParamWrapper | None:
    """The wrapper of the parameter of this name in the model, if it is adapted already."""
    module_name, _, name = key.rpartition(".")
    module = model.get_submodule(module_name)
    while isinstance(module, ParamWrapper):
        if module.parameter_name == name:
            return module
        module = module.base_layer
    return None


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names that all parameters of the base model had before any adapter, and the module that holds each."""
    for module_name, module in around_adapters(model):
        plain = f"{module_name.replace('.base_layer', '')}.".removeprefix(".")
        yield from ((f"{plain}{name}", module) for name, _ in module.named_parameters(recurse=False))


def _stacks(model: nn.Module) -> list[str]:
    """The names of parameters that look like experts: neither a vector with room for a batch nor a kernel."""
    return [
        key
        for key, module in parameters_of(model)
        if len(shape := whole_shape(module, key.rpartition(".")[2])) == 3 and min(shape) > 1
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    ]


def _ends(keys: Iterable[str]) -> list[str]:
    """The last parts of names, as of all layers: `mlp.experts.down_proj`."""
    return sorted({".".join(key.split(".")[-3:]) for key in keys})


def target_parameters(model: nn.Module, config: SmoaConfig) -> list[tuple[str, nn.Module]]:
    """The parameters that `target_parameters` names, whole or by their last parts, as PEFT matches them, each with the
    module that holds it."""
    if not (named := config.target_parameters or []):
        return []
    targets = [(key, module) for key, module in parameters_of(model) if any(_matches(key, name) for name in named)]
    for name in named:
        if any(_matches(key, name) for key, _ in targets):
            continue
        near = difflib.get_close_matches(name, _ends(_stacks(model)), n=1, cutoff=0)
        remedy = f"did you mean {near[0]!r}?" if near else "it has no parameter of three dimensions; use target_modules"
        for module_name, module in model.named_modules():
            if any(_matches(f"{module_name}.{part}", name) for part in getattr(module, "parametrizations", ())):
                remedy = "one of that name is parametrized; remove the parametrization first"
        raise ConfigError(f"target_parameters: {name!r} matches no parameter of the model; {remedy}")
    return targets


def _matches(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def check_parameter(key: str, module: nn.Module, config: SmoaConfig) -> Shape:
    """Shape of one of the matrices of the parameter `key` of the model, which a module holds."""
    module_name, _, name = key.rpartition(".")
    tensor, shape = getattr(module, name), whole_shape(module, name)
    place = f"target_parameters: {key} has shape {shape}"
    if not module_name:  # these first words are PEFT's
        raise ConfigError(
            "Targeting an nn.Parameter on the top-level module is not supported "
            f"(parameter '{name}'). It has shape {shape}; put the module into another one"
        )
    if len(shape) not in (2, 3):
        raise ConfigError(f"{place}, and only those of 2 or 3 dimensions hold matrices; leave it out")
    if module_name.split(".")[-1] in ROUTERS or type(module).__name__.endswith("Router"):
        raise ConfigError(f"{place} and chooses the experts, which SMoA doesn't adapt; leave the router out")
    if hasattr(module, "parametrizations"):
        raise UnsupportedModuleError(f"{place} and is parametrized; remove the parametrization first")
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise UnsupportedModuleError(
            f"{place} and is quantized to {tensor.dtype}, and nothing dequantizes experts; load the model with "
            "dequantize=True, or without quantization"
        )
    layout = Layout.of(module, name)
    check_fit(key, layout.shape, config)
    return layout.shape


def check_fit(name: str, shape: Shape, config: SmoaConfig) -> None:
    """Raise PartitionError if K, as `num_blocks_pattern` sets it, is larger than a side of a matrix of this shape."""
    with named(name):
        check_num_blocks(config.num_blocks_of(name, shape), *shape)


# Warnings.


def _report_experts(
    model: nn.Module, config: SmoaConfig, every_linear: bool, is_target: Callable[[Any, str], object]
) -> None:
    """Warn, once for each model, that "all-linear", or names that they had, leave the experts out, and how to name
    them. Of a LoRA, PEFT makes target parameters of both."""
    given = config.target_modules or ()
    may_name = isinstance(given, str) or not {name.rpartition(".")[2] for name in given}.isdisjoint(EXPERTS)
    if config.target_parameters or model in _REPORTED or not may_name:
        return
    stacks = [key for key in _stacks(model) if "expert" in key.lower() or "moe" in key.lower()]
    places = {key.rpartition(".")[0] for key in stacks}
    named = [name for name in EXPERTS if any(is_target(config, f"{place}.{name}") for place in places)]
    if stacks and (every_linear or named):
        _REPORTED.add(model)
        told = "='all-linear' takes linear layers only" if every_linear else f" has {', '.join(named)}"
        warnings.warn(
            f"target_modules{told}; the experts of this mixture are parameters and not adapted. To adapt them too, add "
            f"target_parameters={_ends(stacks)}",
            stacklevel=2,
        )


def _report_narrow(shapes: Mapping[str, Shape], config: SmoaConfig) -> None:
    """Name the targets that take fewer blocks than `num_blocks`, in one warning, given the shapes of their weights."""
    bare = [name for name, shape in shapes.items() if 0 in config.ranks_of(name, shape=shape)]
    if bare:
        warnings.warn(
            f"r is smaller than num_blocks in {first_of(bare)}: blocks of rank 0 get no adapter, and their part of the "
            "weight can't change; raise r to at least num_blocks, or lower num_blocks",
            stacklevel=2,
        )
    narrow = [name for name, shape in shapes.items() if config.num_blocks_of(name, shape) < config.num_blocks_of(name)]
    if narrow:
        named = first_of([f"{name} takes {min(shapes[name])}" for name in narrow])
        warnings.warn(
            f"num_blocks={config.num_blocks} is larger than a side of {len(narrow)} of {len(shapes)} targets: {named}; "
            "the rank of a block and alpha / r stay the same",
            stacklevel=2,
        )
