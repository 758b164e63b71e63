"""Finds the settings that fit a parameter budget on a model: SMoA's r for each number of blocks, and the one key that
sizes any other method. PEFT counts them on the model without its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from smoa import ConfigError
from smoa_lab.base_models import empty_model
from smoa_lab.config.methods import OTHER_LAYERS, Method, count_trained, find_method
from smoa_lab.config.run import ModelSection
from smoa_lab.config.validation import method_problems, refuse
from smoa_lab.config.yaml_text import apply_overrides

BLOCKS = (1, 2, 4, 8, 16, 32)
FIRST_BLOCKS = 4
"""The number of blocks of a first config."""
ALL_LINEAR = "all-linear"
"""Every linear layer but the output, as PEFT understands it."""
LORA = "lora:"
"""Before a rank: as many parameters as LoRA of that rank trains on the same layers."""
RANKS = (8, 16)
"""The values of the key that sizes a method between whose counts a line is laid."""
SMALLEST, MOST = 0.85, 1.02
"""Shares of a budget below and above which a method isn't compared."""


@dataclass(frozen=True)
class Sized:
    """A method at a budget: ``adapter`` holds the key that sets its size, ``parameters`` is what it trains, if known.
    ``note`` says what keeps it from the budget."""

    method: str
    adapter: dict[str, int] = field(default_factory=dict)
    parameters: int | None = None
    note: str = ""

    def misses(self, budget: float, amount: str) -> str:
        """Why it isn't compared at ``budget``, the parameters of ``amount``; nothing where it is near enough."""
        if budget * SMALLEST <= (self.parameters or 0) <= budget * MOST:
            return ""
        why = self.note or "its nearest size is too far"
        return f"{self.method} can't have the {budget:,.0f} parameters of {amount} ({why})"


def method_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Further keys of methods, of texts such as ``ia3.feedforward_modules=[down_proj]``; ConfigError for a method or a
    key that no run could have."""
    given: dict[str, Any] = {}
    apply_overrides(given, words)
    settings = {name.lower(): block for name, block in given.items()}
    for name, block in settings.items():
        if not isinstance(block, dict):
            raise ConfigError(f"--set {name}: write METHOD.KEY=VALUE, e.g. ia3.feedforward_modules=[down_proj]")
        problems = method_problems({"method": name, "adapter": block})
        refuse("--set", (((name, *path[1:]), reason) for path, reason in problems))
    return settings


def size_methods(
    model: str,
    amount: str,
    targets: Sequence[str],
    names: Sequence[str] = ("smoa",),
    settings: Mapping[str, dict[str, Any]] | None = None,
) -> list[Sized]:
    """Each of the methods ``names`` at ``amount``, as :func:`budget_parameters` reads it, with the ``settings`` of
    :func:`method_settings`; SMoA for each of :data:`BLOCKS` if these give no number of blocks.

    ``targets`` name layers, and with their module experts in parameters, such as ``experts.down_proj``.
    """
    empty, layers = empty_model(ModelSection(name=model)), [name for name in targets if "." not in name]
    chosen: dict[str, Any] = {"target_modules": ALL_LINEAR if ALL_LINEAR in targets else layers}
    chosen |= {"target_parameters": experts} if (experts := [name for name in targets if "." in name]) else {}
    budget = budget_parameters(amount, empty.num_parameters(), lora_on(empty, chosen))
    sized = []
    for name in names:
        found = find_method(name).config_class
        block = {} if name.lower() in OTHER_LAYERS or found is None else dict(chosen)
        block |= {"total_step": 1} if hasattr(found, "total_step") else {}  # AdaLoRA's, which costs nothing
        block |= (settings or {}).get(name.lower(), {})
        has_blocks = hasattr(found, "num_blocks") and "num_blocks" not in block
        for own in [{"num_blocks": number} for number in BLOCKS] if has_blocks else [dict[str, int]()]:
            one = size_method(empty, name, block | own, budget)
            sized.append(replace(one, adapter=own | one.adapter))
    return sized


def size_method(empty: PreTrainedModel, name: str, adapter: dict[str, Any], budget: float) -> Sized:
    """The method on ``empty``, a model on the meta device, with the other keys of its block in ``adapter``: the value
    of the key that sizes it at which it trains nearest to ``budget``, at most 2 % more, by a line between what PEFT
    counts at two values. A method whose counts make no line has the size of its block."""
    method = find_method(name)
    if method.config_class is None:
        return Sized(name, {}, empty.num_parameters(), "trains all weights")
    key = method.budget_key
    try:
        if key is None or key in adapter:
            return Sized(name, {}, _trained(empty, method, adapter), f"is sized by --set {name}.KEY=VALUE")
        unit = adapter.get("num_blocks", 1)  # by whose multiples SMoA's counts make a line, also in narrow layers
        low, high = (_trained(empty, method, {**adapter, key: unit * value}) for value in RANKS)
        slope = (high - low) / (RANKS[1] - RANKS[0])
        if slope <= 0:
            return Sized(name, {}, low, f"{key} doesn't size it; give --set {name}.KEY=VALUE")
        nearest = min(round(RANKS[0] + (budget - low) / slope), math.floor(RANKS[0] + (MOST * budget - low) / slope))
        if nearest < 1:
            least = low - slope * (RANKS[0] - 1)
            return Sized(name, note=f"{key} can't make it so small: it trains {least:,.0f} or more")
        trained = _trained(empty, method, {**adapter, key: unit * nearest})
    except ConfigError as error:
        return Sized(name, note=str(error).removeprefix("adapter: "))
    share = trained / budget
    return Sized(name, {key: unit * nearest}, trained, "" if share >= 0.95 else f"{share:.0%} of the budget")


def _trained(empty: PreTrainedModel, method: Method, block: dict[str, Any]) -> int:
    """What the method trains; one that looks at weights when it starts is given zeros. Raises ConfigError where the
    block is refused."""
    wanted = method.peft_config(block)
    assert wanted is not None
    with suppress(RuntimeError):  # PyTorch's, of a tensor without data
        return count_trained(empty, wanted)
    try:
        return count_trained(_with_zeros(copy.deepcopy(empty)), wanted)
    except RuntimeError as error:
        raise ConfigError("reads the weights when it starts, so it can't be counted without them") from error


def _with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """The model with zeros for weights, which take no memory."""
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
            setattr(module, name, nn.Parameter(zeros, False) if isinstance(value, nn.Parameter) else zeros)
    return model


def lora_on(empty: PreTrainedModel, adapter: Mapping[str, Any]) -> int:
    """What LoRA of rank 1 trains on the layers that a method's block chooses, by default all linear ones."""
    keys = ("target_modules", "target_parameters", "exclude_modules")
    chosen = {key: adapter[key] for key in keys if adapter.get(key) is not None}
    return count_trained(empty, LoraConfig(**{"r": 1, "target_modules": ALL_LINEAR, **chosen}))


def budget_parameters(amount: str, total: int, of_lora: int) -> float:
    """The parameters that ``amount`` is: ``"0.1%"`` of a model with ``total``, a count, or ``"lora:8"``, what LoRA of
    that rank trains, where LoRA of rank 1 trains ``of_lora``."""
    text = amount.replace(",", "").replace("_", "").strip().lower()
    unit = of_lora if text.startswith(LORA) else total / 100 if text.endswith("%") else 1
    try:
        limit = float(text.removeprefix(LORA).removesuffix("%")) * unit
    except ValueError as error:
        known = "a percentage such as 0.1%, nor a parameter count, nor LoRA's of a rank, such as lora:8"
        raise ConfigError(f"budget: {amount!r} is neither {known}") from error
    if not 0 < limit < total:
        raise ConfigError(f"budget: {amount!r} must be more than 0 and less than the model's {total:,} parameters")
    return limit
