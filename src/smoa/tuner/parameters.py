"""Finds and checks the parameters of experts that `target_parameters` names."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakSet

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smoa.config import Shape, SmoaConfig
from smoa.errors import ConfigError, PartitionError, UnsupportedModuleError
from smoa.files.loading import AdapterFile
from smoa.layers.experts import ParamWrapper
from smoa.maths.blocks import check_num_blocks
from smoa.maths.experts import Layout

ROUTERS = ("router", "gate")
"""Names of modules that choose the experts of each token."""
_REPORTED: WeakSet[nn.Module] = WeakSet()
"""Models whose experts `report_experts` has named."""


class TargetParameter(NamedTuple):
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
        return getattr(self.module, self.name)  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, also while ZeRO-3 has partitioned it."""
        return tuple(getattr(self.tensor, "ds_shape", self.tensor.shape))

    @property
    def short(self) -> str:
        """The last parts of its name, as one names it: `mlp.experts.down_proj`."""
        return ".".join(self.key.split(".")[-3:])

    @property
    def holds_experts(self) -> bool:
        """Whether it looks like a stack of matrices: not like a vector with room for a batch, nor a kernel."""
        is_stack = len(self.shape) == 3 and min(self.shape) > 1
        return is_stack and not isinstance(self.module, nn.Conv1d | nn.ConvTranspose1d)


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
    targets = [target for target in parameters_of(model) if any(_matches(target.key, name) for name in named)]
    for name in named:
        if any(_matches(target.key, name) for target in targets):
            continue
        stacks = sorted({target.short for target in parameters_of(model) if target.holds_experts})
        near = difflib.get_close_matches(name, stacks, n=1, cutoff=0)
        remedy = f"did you mean {near[0]!r}?" if near else "it has no parameter of three dimensions; use target_modules"
        for module_name, module in model.named_modules():
            if any(_matches(f"{module_name}.{part}", name) for part in getattr(module, "parametrizations", ())):
                remedy = "one of that name is parametrized; remove the parametrization first"
        raise ConfigError(f"target_parameters: {name!r} matches no parameter of the model; {remedy}")
    return targets


def _matches(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def check_parameter(target: TargetParameter, config: SmoaConfig, file: AdapterFile | None = None) -> Shape:
    """Shape of one of the parameter's matrices.

    Raises:
        ConfigError: the parameter is of a router or of the model itself, or has another number of dimensions than 2
            and 3.
        UnsupportedModuleError: it is quantized or parametrized.
        AdapterFileError: the config gives it a larger rank than any factor in the file has.
        PartitionError: K is larger than a side of its matrices, and `num_blocks_pattern` or `block_ranks` sets it.
    """
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
    layout = Layout.of(target.module, target.name)
    check_fit(target.key, layout.shape, config, file, layout.count)
    return layout.shape


def check_fit(name: str, shape: Shape, config: SmoaConfig, file: AdapterFile | None, count: int = 1) -> None:
    """Check that `count` matrices of this shape have room for their blocks, and no more ranks than the file.

    Raises:
        AdapterFileError: the config gives them a larger rank than any factor in the file has.
        PartitionError: K is larger than a side, and `num_blocks_pattern` or `block_ranks` sets it.
    """
    if file is not None:
        file.check_rank(name, count * config.rank_of(name, shape))
    try:
        check_num_blocks(config.num_blocks_of(name, shape), *shape)
    except PartitionError as error:
        raise PartitionError(f"{name}: {error}") from None


def report_experts(model: nn.Module, config: SmoaConfig) -> None:
    """Warn, once for each model, that "all-linear" leaves the experts out, and how to name them."""
    if config.target_modules != "all-linear" or config.target_parameters or model in _REPORTED:
        return
    stacks = sorted({target.short for target in parameters_of(model) if target.holds_experts})
    if stacks:
        _REPORTED.add(model)
        warnings.warn(
            "target_modules='all-linear' takes linear layers only; the experts of this mixture are parameters and not "
            f"adapted. To adapt them too, add target_parameters={stacks}",
            stacklevel=2,
        )
