"""Checks which modules can be adapted, and returns their weights."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from transformers import PreTrainedModel

from smoa.config.adapter_config import Shape, SmoaConfig
from smoa.errors import ConfigError, PartitionError, UnsupportedModuleError
from smoa.files.loading import AdapterFile
from smoa.layers.distributed import awaits_process_group, from_rank_zero, whole
from smoa.layers.kinds.kind_table import KINDS, QUANTIZED, Kind, kind_of
from smoa.layers.kinds.linear import Linear
from smoa.layers.kinds.quantized import find_backend
from smoa.layers.layer import SmoaLayer
from smoa.maths.blocks import check_num_blocks
from smoa.maths.spectrum import finite_peak

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

SUPPORTED = ", ".join(kind.name for kind in (*KINDS, QUANTIZED))

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Types of models whose fused kernels read the weights of a mixer's `out_proj` and `conv1d`, and don't call them."""


class Target(NamedTuple):
    """A module that can be adapted: its kind, the shape of W, and the backend that dequantizes W, if it must be."""

    kind: Kind
    shape: Shape
    backend: QuantizationBackend | None


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside an adapted module, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def check_target(
    name: str, module: nn.Module, config: SmoaConfig, model: nn.Module, file: AdapterFile | None = None
) -> Target:
    """Return what is known of a module that can be adapted.

    Args:
        name: Name of the module in the model.
        module: The target.
        config: The adapter's settings.
        model: The base model.
        file: The weights of the adapter, if it is being loaded.

    Raises:
        ConfigError: the kernels of a Mamba model read its weight and don't call it.
        UnsupportedModuleError: SMoA can't adapt this kind of module.
        AdapterFileError: the config gives it a larger rank than any factor in the file has.
        PartitionError: K is larger than a side of its weight, and `num_blocks_pattern` or `block_ranks` sets it.
    """
    if _is_read_by_kernels(name, model):
        raise ConfigError(f"{name}: is incompatible with Mamba-based models, whose kernels never call it; leave it out")
    base = base_of(module)
    try:
        backend = find_backend(base, model)
    except UnsupportedModuleError as error:
        raise UnsupportedModuleError(f"{name}: {error} (it has {_shapes(base)})") from error
    kind = kind_of(base) if backend is None else QUANTIZED
    refusal = f"supported are {SUPPORTED}" if kind is None else kind.refusal(base)
    refusal = refusal or _uncalled(name, base, model, config)
    if kind is None or refusal is not None:
        raise UnsupportedModuleError(
            f"{name}: SMoA can't adapt a {type(base).__module__}.{type(base).__qualname__}; {refusal}; "
            f"remove it from target_modules or add it to exclude_modules (it has {_shapes(base)})"
        )
    shape = kind.shape_of(base)
    if file is not None:
        file.check_rank(name, config.rank_of(name, shape))
    try:
        check_num_blocks(config.num_blocks_of(name, shape), *shape)
    except PartitionError as error:
        raise PartitionError(f"{name}: {error}") from None
    return Target(kind, shape, backend)


def check_finite(name: str, stored: Tensor, layer: SmoaLayer | None) -> None:
    """Check a weight of which blocks will be made. Every rank must call this.

    Args:
        name: Name of the module or parameter.
        stored: The weight.
        layer: The module's or parameter's adapted layer, if it has one, which may be merged.

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


def _is_read_by_kernels(name: str, model: nn.Module) -> bool:
    is_mamba = getattr(getattr(model, "config", None), "model_type", None) in MAMBA
    return is_mamba and name.rpartition(".")[2] in ("out_proj", "conv1d")


def _shapes(base: nn.Module) -> str:
    """The shapes of a module's own parameters in words, also while ZeRO-3 has left them empty."""
    shapes = [
        f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))}"
        for name, parameter in base.named_parameters(recurse=False)
        if not isinstance(parameter, UninitializedParameter)
    ]
    return ", ".join(shapes) or "no parameters"


def _uncalled(name: str, base: nn.Module, model: nn.Module, config: SmoaConfig) -> str | None:
    """Why an adapter would do nothing: in T5 and others other embeddings, which have its weight, are called instead."""
    place, _, attribute = name.rpartition(".")
    parent = model.get_submodule(place)
    if not isinstance(base, nn.Embedding) or not isinstance(parent, PreTrainedModel):
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


def leave_out(config: SmoaConfig, model: nn.Module) -> None:
    """Take linear layers that can't be adapted, such as routers, out of the targets that "all-linear" has become."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in config.target_modules or ():
        base = base_of(modules[name])
        kind = kind_of(base)
        with suppress(UnsupportedModuleError):  # which `check_target` raises
            if kind is not None and find_backend(base, model) is None and kind.refusal(base) is not None:
                found[name] = base
    uncalled = {name for name in modules if _is_read_by_kernels(name, model)}
    config.target_modules = set(config.target_modules or []).difference(found, uncalled)  # type: ignore[assignment]
    # MultiheadAttention's is not named: nobody takes it for a layer
    named = sorted(name for name, base in found.items() if Linear.refusal(base) is None)
    if named:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        classes = ", ".join(sorted({type(found[name]).__name__ for name in named}))
        warnings.warn(
            f"target_modules='all-linear' leaves out {', '.join(named[:3])}{more}: SMoA can't adapt a {classes}, which "
            "computes something else than a linear layer of a plain weight",
            stacklevel=2,
        )


def report_towers(targets: Iterable[str], model: nn.Module) -> None:
    """Name the vision and audio towers of a language model that "all-linear" adapts too, in one warning."""
    model_config = getattr(model, "config", None)
    owned = {type(getattr(model_config, key, None)) for key in ("vision_config", "audio_config")} - {type(None)}
    towers = [name for name, module in model.named_modules() if type(getattr(module, "config", None)) in owned]
    outermost = [name for name in towers if not name.startswith(tuple(f"{other}." for other in towers))]
    counts = {name: sum(target.startswith(f"{name}.") for target in targets) for name in outermost}
    if found := {name: count for name, count in counts.items() if count}:
        named = ", ".join(f"{name} ({count} layers)" for name, count in found.items())
        warnings.warn(
            f'target_modules="all-linear" adapts {named} too, which is not part of the language model; '
            f'to leave it out, set exclude_modules=r"({"|".join(map(re.escape, found))})\\..*"',
            stacklevel=2,
        )


def report_narrow(shapes: Mapping[str, Shape], config: SmoaConfig) -> None:
    """Name the targets that take fewer blocks than `num_blocks`, in one warning.

    Args:
        shapes: Shape of the weight of each target, by name.
        config: The adapter's settings.
    """
    narrow = [name for name, shape in shapes.items() if config.num_blocks_of(name, shape) < config.num_blocks_of(name)]
    if narrow:
        named = ", ".join(f"{name} takes {min(shapes[name])}" for name in narrow[:3])
        more = f", and {len(narrow) - 3} more take fewer too" if len(narrow) > 3 else ""
        warnings.warn(
            f"num_blocks={config.num_blocks} is larger than a side of {len(narrow)} of {len(shapes)} targets: {named}"
            f"{more}; the rank of a block and alpha / r stay the same",
            stacklevel=2,
        )
