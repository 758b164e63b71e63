"""`ensure_weight_tying`: one adapter for all layers of one weight, such as an embedding and the head tied to it.

The layers have the same matrix W, so they get the same factors, blocks and scales: the same W + ΔW. Which layers share
a weight is seen from the model, not from its class or config.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from smoa.config import Shape, SmoaConfig
from smoa.errors import ConfigError, MergeError
from smoa.layers.kinds import Embedding
from smoa.layers.layer import SmoaLayer

Group = list[str]
"""Names of the modules that share one weight."""


def tied_groups(model: nn.Module) -> list[Group]:
    """The modules that share their weight with others, adapted already or not."""
    users: dict[int, Group] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and ".smoa_" not in name:
            users.setdefault(weight_id(weight), []).append(name.removesuffix(".base_layer"))
    return [names for names in users.values() if len(names) > 1]


def tie_targets(model: nn.Module, config: SmoaConfig, is_target: Callable[[SmoaConfig, str], object]) -> list[Group]:
    """Add the other layers of a target's weight to the config's targets, if `ensure_weight_tying` is set. Return the
    groups."""
    if not config.ensure_weight_tying:
        return []
    groups = tied_groups(model)
    saved = [rf"(.*\.)?{re.escape(name)}" for name in config.modules_to_save or []]
    for group in groups:
        for name in group:
            if any(re.fullmatch(pattern, name) for pattern in saved):
                raise ConfigError(
                    f"ensure_weight_tying: modules_to_save copies {name}, which shares its weight with "
                    f"{_other(group, name)}, and SMoA ties adapters, not copies; name it in target_modules instead"
                )
    targets = [group for group in groups if any(is_target(config, name) for name in group)]
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for group in targets:
        for name in group:
            if places[id(model.get_submodule(name))] > 1:  # after the vocabulary was resized
                raise ConfigError(
                    f"ensure_weight_tying: {name} is one module at several places of the model, and PEFT adapts it at "
                    "one; save and load the model, which makes modules of their own"
                )
        if isinstance(config.target_modules, str):
            config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, group)])
        else:  # PEFT makes a set of it, too
            config.target_modules = {*(config.target_modules or []), *group}  # type: ignore[assignment]
        for name in group:
            if not is_target(config, name):
                raise ConfigError(
                    f"ensure_weight_tying: {name} shares its weight with {_other(group, name)}, and "
                    f"exclude_modules={config.exclude_modules!r} leaves it out; drop one of the two settings"
                )
    if not targets and not config.trainable_token_indices:
        warnings.warn(
            "ensure_weight_tying has no effect: no target shares its weight with another layer; name the embedding or "
            "the head in target_modules, or drop the setting",
            stacklevel=2,
        )
    return targets


def _other(group: Group, name: str) -> str:
    return next(other for other in group if other != name)


def check_alike(groups: list[Group], shapes: Mapping[str, Shape], config: SmoaConfig) -> None:
    """Raise ConfigError unless the layers of each group have one shape, rank, alpha and number of blocks."""
    for first, *others in groups:
        settings = {}
        for name in (first, *others):
            ranks = config.ranks_of(name, shape=shapes[name])
            settings[name] = shapes[name], ranks, config.alpha_of(name, sum(ranks), shapes[name])
            if settings[name] != settings[first]:
                raise ConfigError(
                    f"ensure_weight_tying: {first} and {name} share one weight and have different settings (shape, "
                    f"block ranks, alpha): {settings[first]} and {settings[name]}; let rank_pattern, alpha_pattern and "
                    "num_blocks_pattern name both or neither"
                )


def tie_layers(model: nn.Module, adapter_name: str) -> None:
    """Give the layers of one weight the adapter of the first of them, or of the embedding among them."""
    modules = dict(model.named_modules())
    for group in tied_groups(model):
        ends = [end for name in group if isinstance(end := modules[name], SmoaLayer) and adapter_name in end.smoa_A]
        ends.sort(key=lambda end: not isinstance(end, Embedding))
        for other in ends[1:]:
            _follow(other, ends[0], adapter_name)


def _follow(layer: SmoaLayer, other: SmoaLayer, adapter_name: str) -> None:
    """Let a layer use another one's factors, blocks and scales. Both have one weight."""
    layer.smoa_A[adapter_name], layer.smoa_B[adapter_name] = other.smoa_A[adapter_name], other.smoa_B[adapter_name]
    if not (source := other.adapters[adapter_name]).pending:
        layer.adapters[adapter_name].decide(*source.saved())
    layer.tied = other.tied = True
    layer._pristine_blocks = other._pristine_blocks  # whichever is merged first overwrites the weight of both


def refuse_shared(layers: Iterable[tuple[str, Tensor, Mapping[str, object]]]) -> None:
    """Raise MergeError if layers, given by name, stored weight and factors, share a weight but not their adapters: a
    merged weight would be wrong for both."""
    owners: dict[int, tuple[str, Mapping[str, object]]] = {}
    for name, weight, factors in layers:
        other, others_factors = owners.setdefault(weight_id(weight), (name, factors))
        if others_factors != factors:
            raise MergeError(
                f"{name} and {other} share one weight but have an adapter each, so no merged weight is right for both; "
                "untie them, adapt one of them only, or set ensure_weight_tying=True before training"
            )


def weight_id(weight: Tensor) -> int:
    """The same for weights in one memory, which need not be one parameter: see `load_state_dict(assign=True)`."""
    return weight.data_ptr() or id(weight)  # 0 on the meta device
