"""Looks at all targets of an adapter before the first one is replaced, and settles what depends on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from smoa.config.adapter_config import Shape, SmoaConfig
from smoa.errors import SmoaError
from smoa.files.loading import incoming
from smoa.layers.layer import SmoaLayer
from smoa.tuner.parameters import check_parameters, existing_wrapper, report_experts, target_parameters
from smoa.tuner.targets import base_of, check_finite, check_target, leave_out, report_narrow, report_towers
from smoa.tuner.tying import check_alike, tie_targets

IsTarget = Callable[[Any, str], object]
"""Whether a config makes the module of a name a target."""


def survey_targets(model: nn.Module, peft_config: Any, is_target: IsTarget, loads_labels: bool) -> int:
    """Check all targets, fill the config's target_modules as PEFT does, and report what a user should know.

    Args:
        model: The base model; nothing of it is changed.
        peft_config: The adapter's config.
        is_target: PEFT's rule for names.
        loads_labels: Whether the adapter's partition is loaded, and not made from the weights.

    Returns:
        The number of target modules.

    Raises:
        SmoaError: names every target that cannot be adapted, and why.
    """
    every_linear = str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    report_experts(model, peft_config)
    config: Any = _maybe_include_all_linear_layers(peft_config, model)
    if every_linear:
        leave_out(config, model)
    groups = tie_targets(model, config, is_target)
    shapes, of_parameters = _check_all(model, config, is_target, loads_labels)
    check_alike(groups, shapes, config)
    if every_linear and not loads_labels:
        report_towers(shapes, model)
    if not loads_labels:
        report_narrow(shapes | of_parameters, config)
    return len(shapes)


def _check_all(
    model: nn.Module, config: SmoaConfig, is_target: IsTarget, loads_labels: bool
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes of the target modules and of the target parameters; raises all problems as one."""
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
    try:
        of_parameters = check_parameters(model, config, set(shapes), file)
        for parameter in [] if loads_labels else target_parameters(model, config):
            known = existing_wrapper(model, parameter.module_name, parameter.name)
            check_finite(parameter.key, parameter.tensor, known)
    except SmoaError as error:
        problems.append(error)
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))
    return shapes, of_parameters
