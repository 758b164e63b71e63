"""Finds and checks the parameters of experts that `target_parameters` names."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from weakref import WeakSet

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smoa.config.adapter_config import Shape, SmoaConfig
from smoa.errors import ConfigError, PartitionError, SmoaError, UnsupportedModuleError
from smoa.files.loading import AdapterFile
from smoa.layers.experts.layout import Layout
from smoa.layers.experts.param_wrapper import ParamWrapper
from smoa.maths.blocks import check_num_blocks

ROUTERS = ("router", "gate")
"""Names of modules that choose the experts of each token."""
_TOLD: WeakSet[nn.Module] = WeakSet()
"""Models whose experts `report_experts` has named."""


@dataclass(frozen=True)
class TargetParameter:
    """A parameter to adapt: its module, and the names of the module and of the parameter in it."""

    module: nn.Module
    module_name: str
    name: str

    @property
    def key(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.module_name}.{self.name}".removeprefix(".")

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        found: Tensor = getattr(self.module, self.name)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, also while ZeRO-3 has partitioned it."""
        return tuple(getattr(self.tensor, "ds_shape", self.tensor.shape))


def existing_wrapper(model: nn.Module, module_name: str, name: str) -> ParamWrapper | None:
    """The wrapper of the parameter `name` of a module, if it is adapted already."""
    module = model.get_submodule(module_name)
    while isinstance(module, ParamWrapper):
        if module.parameter_name == name:
            return module
        module = module.base_layer
    return None


def parameters_of(model: nn.Module) -> Iterator[TargetParameter]:
    """All parameters of the base model, with the names that they had before any adapter."""
    inside = tuple(
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for part in (*module.adapter_layer_names, *module.other_param_names)
    )
    for module_name, module in model.named_modules():
        if not module_name.startswith(inside):
            plain = module_name.replace(".base_layer", "")
            yield from (TargetParameter(module, plain, name) for name, _ in module.named_parameters(recurse=False))


def target_parameters(model: nn.Module, config: SmoaConfig) -> list[TargetParameter]:
    """The parameters that `target_parameters` names, whole or by their last parts, as PEFT matches them.

    Raises:
        ConfigError: a name matches none.
    """
    named = config.target_parameters or []
    found = [target for target in parameters_of(model) if any(_matches(target.key, name) for name in named)]
    lost = [name for name in named if not any(_matches(target.key, name) for target in found)]
    if lost:
        raise ConfigError(
            f"target_parameters: {lost[0]!r} matches no parameter of the model; {_proposal(model, lost[0])}"
        )
    return found


def _matches(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _proposal(model: nn.Module, name: str) -> str:
    for module_name, module in model.named_modules():
        for parameter in getattr(module, "parametrizations", ()):
            if _matches(f"{module_name}.{parameter}", name):
                return "one of that name is parametrized; remove the parametrization first"
    stacks = sorted({_short(target) for target in parameters_of(model) if _holds_experts(target)})
    near = difflib.get_close_matches(name, stacks, n=1, cutoff=0)
    return f"did you mean {near[0]!r}?" if near else "it has no parameter of three dimensions; use target_modules"


def _short(target: TargetParameter) -> str:
    """The last parts of a parameter's name, as one names it: `mlp.experts.down_proj`."""
    return ".".join(target.key.split(".")[-3:])


def check_parameters(
    model: nn.Module, config: SmoaConfig, targets: Collection[str], file: AdapterFile | None = None
) -> dict[str, Shape]:
    """Shape of the matrices of each parameter that `target_parameters` names.

    Args:
        model: The base model.
        config: The adapter's settings.
        targets: Names of the modules that `target_modules` matches.
        file: The weights of the adapter, if it is being loaded.

    Raises:
        SmoaError: of the first problem; the message has all of them.
    """
    shapes: dict[str, Shape] = {}
    problems: list[SmoaError] = []
    for target in target_parameters(model, config):
        try:
            if target.module_name in targets:
                raise ConfigError(f"{target.key}: target_modules names its module too; name it in one of the two")
            shapes[target.key] = check_parameter(target, config, file)
        except SmoaError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))
    return shapes


def check_parameter(target: TargetParameter, config: SmoaConfig, file: AdapterFile | None = None) -> Shape:
    """Shape of one of the parameter's matrices.

    Args:
        target: The parameter.
        config: The adapter's settings.
        file: The weights of the adapter, if it is being loaded.

    Raises:
        ConfigError: the parameter is of a router or of the model itself, or has another number of dimensions than 2
            and 3.
        UnsupportedModuleError: it is quantized or parametrized.
        PartitionError: K is larger than a side of its matrices, and `num_blocks_pattern` or `block_ranks` sets it.
    """
    _check_kind(target)
    layout = Layout.of(target.module, target.name)
    shape = layout.shape
    if file is not None:
        file.check_rank(target.key, layout.count * config.rank_of(target.key, shape))
    try:
        check_num_blocks(config.num_blocks_of(target.key, shape), *shape)
    except PartitionError as error:
        raise PartitionError(f"{target.key}: {error}") from None
    return shape


def _check_kind(target: TargetParameter) -> None:
    place = f"target_parameters: {target.key} has shape {target.shape}"
    if not target.module_name:  # these first words are PEFT's
        raise ConfigError(
            "Targeting an nn.Parameter on the top-level module is not supported "
            f"(parameter '{target.name}'). It has shape {target.shape}; put the module into another one"
        )
    if len(target.shape) not in (2, 3):
        raise ConfigError(f"{place}, and only those of 2 or 3 dimensions hold matrices; leave it out")
    if target.module_name.split(".")[-1] in ROUTERS or type(target.module).__name__.endswith("Router"):
        raise ConfigError(f"{place} and chooses the experts, which SMoA doesn't adapt; leave the router out")
    if hasattr(target.module, "parametrizations"):
        raise UnsupportedModuleError(f"{place} and is parametrized; remove the parametrization first")
    if not target.tensor.is_floating_point() or target.tensor.itemsize == 1:
        raise UnsupportedModuleError(
            f"{place} and is quantized to {target.tensor.dtype}, and nothing dequantizes experts; load the model with "
            "dequantize=True, or without quantization"
        )


def report_experts(model: nn.Module, config: SmoaConfig) -> None:
    """Warn, once for each model, that "all-linear" leaves the experts out, and how to name them."""
    if config.target_modules != "all-linear" or config.target_parameters or model in _TOLD:
        return
    stacks = sorted({_short(target) for target in parameters_of(model) if _holds_experts(target)})
    if stacks:
        _TOLD.add(model)
        warnings.warn(
            "target_modules='all-linear' takes linear layers only; the experts of this mixture are parameters and not "
            f"adapted. To adapt them too, add target_parameters={stacks}",
            stacklevel=2,
        )


def _holds_experts(target: TargetParameter) -> bool:
    """Whether the parameter looks like a stack of matrices: not like a vector with room for a batch, nor a kernel."""
    is_stack = len(target.shape) == 3 and min(target.shape) > 1
    return is_stack and not isinstance(target.module, nn.Conv1d | nn.ConvTranspose1d)
