"""Finds and checks the layers to adapt, before the first one is replaced, and says what a user should know of them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from transformers import PreTrainedModel

from smoa.config import Shape, SmoaConfig
from smoa.errors import ConfigError, PartitionError, SmoaError, UnsupportedModuleError
from smoa.files.loading import AdapterFile, incoming
from smoa.layers.distributed import awaits_process_group, from_rank_zero, whole
from smoa.layers.kinds import KINDS, QUANTIZED, Kind, kind_of
from smoa.layers.layer import SmoaLayer
from smoa.layers.quantized import find_backend
from smoa.maths.spectrum import finite_peak
from smoa.tuner.parameters import (
    TargetParameter,
    check_fit,
    check_parameter,
    existing_wrapper,
    report_experts,
    target_parameters,
)
from smoa.tuner.tying import check_alike, tie_targets

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

SUPPORTED = ", ".join(kind.name for kind in (*KINDS, QUANTIZED))

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types of models whose fused kernels read the weights of a mixer's `out_proj` and `conv1d`, and don't call them."""

IsTarget = Callable[[Any, str], object]
"""Whether a config makes the module of a name a target."""


class Target(NamedTuple):
    """A module that can be adapted: its kind, the shape of W, and the backend that dequantizes W, if it must be."""

    kind: Kind
    shape: Shape
    backend: QuantizationBackend | None


def survey_targets(model: nn.Module, peft_config: Any, is_target: IsTarget, loads_labels: bool) -> int:
    """Check all targets, fill the config's target_modules as PEFT does, and report what a user should know.

    Nothing of the model is changed. With `loads_labels` the partition is not made from the weights. Return the number
    of target modules.

    Raises:
        SmoaError: names every target that cannot be adapted, and why.
    """
    every_linear = str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    report_experts(model, peft_config)
    config: Any = _maybe_include_all_linear_layers(peft_config, model)
    if every_linear:
        _leave_out(config, model)
    groups = tie_targets(model, config, is_target)
    file = incoming()
    inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, SmoaLayer))
    problems: list[SmoaError] = []
    shapes: dict[str, Shape] = {}
    of_parameters: dict[str, Shape] = {}
    for name, module in model.named_modules():
        if name and not name.startswith(inside) and is_target(config, name):
            try:
                target = check_target(name, module, config, model, file)
                shapes[name] = target.shape
                if not loads_labels and target.backend is None:
                    weight: Any = base_of(module).weight
                    check_finite(name, weight, module if isinstance(module, SmoaLayer) else None)
            except SmoaError as error:
                problems.append(error)
    parameters: list[TargetParameter] = []
    try:
        parameters = target_parameters(model, config)
    except ConfigError as error:
        problems.append(error)
    for parameter in parameters:
        try:
            if parameter.module_name in shapes:
                raise ConfigError(f"{parameter.key}: target_modules names its module too; name it in one of the two")
            of_parameters[parameter.key] = check_parameter(parameter, config, file)
            if not loads_labels:
                known = existing_wrapper(model, parameter.module_name, parameter.name)
                check_finite(parameter.key, parameter.tensor, known)
        except SmoaError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))
    check_alike(groups, shapes, config)
    if not loads_labels:
        if every_linear:
            _report_towers(shapes, model)
        report_narrow(shapes | of_parameters, config)
    return len(shapes)


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside an adapted module, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def check_target(
    name: str, module: nn.Module, config: SmoaConfig, model: nn.Module, file: AdapterFile | None = None
) -> Target:
    """Return what is known of a module that can be adapted; `file` has its weights, if they are being loaded.

    Raises:
        ConfigError: the kernels of a Mamba model read its weight and don't call it.
        UnsupportedModuleError: SMoA can't adapt this kind of module.
        AdapterFileError: the config gives it a larger rank than any factor in the file has.
        PartitionError: K is larger than a side of its weight, and `num_blocks_pattern` or `block_ranks` sets it.
    """
    base = base_of(module)
    try:
        backend = find_backend(base, model)
    except UnsupportedModuleError as error:
        raise UnsupportedModuleError(f"{name}: {error} (it has {_shapes(base)})") from error
    kind = kind_of(base) if backend is None else QUANTIZED
    refusal = _refusal(name, base, kind, model, config)
    if refusal is not None:
        raise refusal
    assert kind is not None, "a layer of no kind was refused"
    shape = kind.shape_of(base)
    check_fit(name, shape, config, file)
    return Target(kind, shape, backend)


def _refusal(
    name: str, base: nn.Module, kind: Kind | None, model: nn.Module, config: SmoaConfig
) -> ConfigError | UnsupportedModuleError | None:
    """Why a layer can't be adapted, or None: the one rule for named targets and for "all-linear"."""
    is_mamba = getattr(getattr(model, "config", None), "model_type", None) in MAMBA
    if is_mamba and name.rpartition(".")[2] in ("out_proj", "conv1d"):
        return ConfigError(  # these words are PEFT's
            f"{name}: is incompatible with Mamba-based models, whose kernels never call it; leave it out"
        )
    if kind is None:
        reason: str | None = f"supported are {SUPPORTED}"
    elif isinstance(base, NonDynamicallyQuantizableLinear):
        reason = "MultiheadAttention uses its weight without calling it, so an adapter would do nothing"
    elif isinstance(base, nn.Embedding) and kind is not QUANTIZED:
        reason = kind.refusal(base) or _uncalled_embedding(name, base, model, config)
    else:
        reason = kind.refusal(base)
    if reason is None:
        return None
    return UnsupportedModuleError(
        f"{name}: SMoA can't adapt a {type(base).__module__}.{type(base).__qualname__}; {reason}; "
        f"remove it from target_modules or add it to exclude_modules (it has {_shapes(base)})"
    )


def _uncalled_embedding(name: str, base: nn.Embedding, model: nn.Module, config: SmoaConfig) -> str | None:
    """Why an adapter would do nothing: in T5 and others other embeddings, which have its weight, are called instead."""
    place, _, attribute = name.rpartition(".")
    parent = model.get_submodule(place)
    if not isinstance(parent, PreTrainedModel):
        return None
    others = {
        other: module
        for other, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
        and module.weight is base.weight
        and other.removesuffix(".base_layer") != name
    }
    forward: Any = inspect.unwrap(type(parent).forward)
    if not others or attribute in forward.__code__.co_names:
        return None
    remedy = "name these, or set ensure_weight_tying=True, which gives all of them one adapter"
    if base in others.values():  # after its vocabulary was resized
        remedy = "save and load the model, which makes these layers of their own"
    elif config.ensure_weight_tying:
        return None
    return (
        f"{type(parent).__name__} does not call it, but {' and '.join(sorted(others))}, which have its weight; {remedy}"
    )


def _leave_out(config: SmoaConfig, model: nn.Module) -> None:
    """Take linear layers that can't be adapted, such as routers, out of the targets that "all-linear" has become."""
    modules = dict(model.named_modules())
    left_out: set[str] = set()
    named: dict[str, str] = {}
    for name in sorted(config.target_modules or ()):
        base = base_of(modules[name])
        with suppress(UnsupportedModuleError):  # of a quantized weight, which `check_target` raises
            kind = kind_of(base) if find_backend(base, model) is None else QUANTIZED
            refusal = _refusal(name, base, kind, model, config)
            if refusal is not None:
                left_out.add(name)
            # Layers that nothing calls are not named: nobody takes them for layers
            if isinstance(refusal, UnsupportedModuleError) and not isinstance(base, NonDynamicallyQuantizableLinear):
                named[name] = type(base).__name__
    config.target_modules = set(config.target_modules or []) - left_out  # type: ignore[assignment]
    if named:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        warnings.warn(
            f"target_modules='all-linear' leaves out {', '.join([*named][:3])}{more}: SMoA can't adapt a "
            f"{', '.join(sorted({*named.values()}))}, which computes something else than a linear layer of a plain "
            "weight",
            stacklevel=2,
        )


def _shapes(base: nn.Module) -> str:
    """The shapes of a module's own parameters in words, also while ZeRO-3 has left them empty."""
    shapes = [
        f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))}"
        for name, parameter in base.named_parameters(recurse=False)
        if not isinstance(parameter, UninitializedParameter)
    ]
    return ", ".join(shapes) or "no parameters"


def check_finite(name: str, stored: Tensor, layer: SmoaLayer | None) -> None:
    """Check a weight of which blocks will be made, and which `layer` may have merged. Every rank must call this.

    Raises:
        PartitionError: the weight has NaN or infinite entries.
    """
    if awaits_process_group():  # weights of other ranks may not be loaded
        return
    with gather_params_ctx(stored):  # for DeepSpeed ZeRO-3
        on_meta = stored.device.type == "meta"
        weight = None if on_meta else whole(stored if layer is None else layer.pristine_weight())
        try:
            from_rank_zero(lambda: None if weight is None else float(finite_peak(weight)))
        except PartitionError as error:
            raise PartitionError(f"{name}: {error}") from None


def _report_towers(targets: Mapping[str, Shape], model: nn.Module) -> None:
    """Name the vision and audio towers of a language model that "all-linear" adapts too, in one warning."""
    model_config = getattr(model, "config", None)
    owned = {type(getattr(model_config, key, None)) for key in ("vision_config", "audio_config")} - {type(None)}
    towers = [name for name, module in model.named_modules() if type(getattr(module, "config", None)) in owned]
    outermost = [name for name in towers if not name.startswith(tuple(f"{other}." for other in towers))]
    counts = {name: sum(target.startswith(f"{name}.") for target in targets) for name in outermost}
    if counted := {name: count for name, count in counts.items() if count}:
        named = ", ".join(f"{name} ({count} layers)" for name, count in counted.items())
        warnings.warn(
            f'target_modules="all-linear" adapts {named} too, which is not part of the language model; '
            f'to leave it out, set exclude_modules=r"({"|".join(map(re.escape, counted))})\\..*"',
            stacklevel=2,
        )


def report_narrow(shapes: Mapping[str, Shape], config: SmoaConfig) -> None:
    """Name the targets that take fewer blocks than `num_blocks`, in one warning, given the shapes of their weights."""
    narrow = [name for name, shape in shapes.items() if config.num_blocks_of(name, shape) < config.num_blocks_of(name)]
    if narrow:
        named = ", ".join(f"{name} takes {min(shapes[name])}" for name in narrow[:3])
        more = f", and {len(narrow) - 3} more take fewer too" if len(narrow) > 3 else ""
        warnings.warn(
            f"num_blocks={config.num_blocks} is larger than a side of {len(narrow)} of {len(shapes)} targets: {named}"
            f"{more}; the rank of a block and alpha / r stay the same",
            stacklevel=2,
        )
