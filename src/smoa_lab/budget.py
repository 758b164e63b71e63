"""Finds the settings that fit a parameter budget on a model: SMoA's r and num_blocks, and the one key that sizes any
other method. Only shapes are read, no weights."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from smoa import ConfigError, DataError, SmoaConfig
from smoa.experts import Layout
from smoa.linear import Linear
from smoa.model import LAYERS
from smoa.partition import block_sizes, check_num_blocks
from smoa_lab.base_models import empty_model
from smoa_lab.config.methods import OTHER_LAYERS, Method, count_trained, find_method
from smoa_lab.config.run import ConfigText, ModelSection
from smoa_lab.config.validation import method_problems
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

# (out_features, in_features) of each adapted layer, counted.
Shapes = Counter[tuple[int, int]]


@dataclass(frozen=True)
class Choice:
    """``r`` and ``num_blocks`` with what they cost: trainable parameters, their share of the model in percent, bytes
    on disk (float32 factors, one byte of label per row and column); ``rank_bound`` is the least, over the layers, of
    the upper bound on the rank of ΔW; ``lora_r`` is LoRA's rank at the same budget."""

    num_blocks: int
    r: int
    parameters: int
    percent: float
    bytes_on_disk: int
    rank_bound: int
    lora_r: int


def budget_choices(model: str, amount: str, targets: tuple[str, ...]) -> list[Choice]:
    """The largest r within ``amount`` for each number of blocks. ``amount`` is ``"0.1%"`` of the model, a parameter
    count, or ``"lora:8"``, what LoRA of that rank trains."""
    empty = empty_model(ModelSection(name=model))
    shapes, total = shapes_of(empty, targets, model), empty.num_parameters()
    limit = budget_parameters(amount, total, lora_parameters(shapes, 1))
    widest = max(min(shape) for shape in shapes)
    largest = {k: _largest_r(shapes, k, limit) for k in BLOCKS if k <= widest}
    choices = [choice_of(shapes, total, r, k) for k, r in largest.items() if r >= k]
    if not choices:
        raise _too_small(amount, shapes)
    return choices


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
    apply_overrides(given, list(words))
    settings = {name.lower(): block for name, block in given.items()}
    for name, block in settings.items():
        if not isinstance(block, dict):
            raise ConfigError(f"--set {name}: write METHOD.KEY=VALUE, e.g. ia3.feedforward_modules=[down_proj]")
        problems = method_problems({"method": name, "adapter": block})
        ConfigText({}, "--set").refuse(((name, *path[1:]), reason) for path, reason in problems)
    return settings


def size_methods(
    model: str,
    amount: str,
    targets: tuple[str, ...],
    names: Sequence[str],
    settings: Mapping[str, dict[str, Any]] | None = None,
) -> list[Sized]:
    """Each of the methods ``names`` at ``amount``, which :func:`budget_choices` explains, with the ``settings`` of
    :func:`method_settings`."""
    empty, wanted = empty_model(ModelSection(name=model)), ALL_LINEAR if ALL_LINEAR in targets else list(targets)
    shapes = shapes_of(empty, targets, model)
    budget = budget_parameters(amount, empty.num_parameters(), lora_parameters(shapes, 1))
    sized = []
    for name in names:
        found = find_method(name).config_class
        block: dict[str, Any] = {} if name.lower() in OTHER_LAYERS or found is None else {"target_modules": wanted}
        block |= {"total_step": 1} if hasattr(found, "total_step") else {}  # AdaLoRA's, which costs nothing
        block |= (settings or {}).get(name.lower(), {})
        sized.append(size_method(empty, name, block, budget))
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
        low, high = (_trained(empty, method, {**adapter, key: value}) for value in RANKS)
        slope = (high - low) / (RANKS[1] - RANKS[0])
        if slope <= 0:
            return Sized(name, {}, low, f"{key} doesn't size it; give --set {name}.KEY=VALUE")
        nearest = min(round(RANKS[0] + (budget - low) / slope), math.floor(RANKS[0] + (MOST * budget - low) / slope))
        if nearest < 1:
            least = low - slope * (RANKS[0] - 1)
            return Sized(name, note=f"{key} can't make it so small: it trains {least:,.0f} or more")
        trained = _trained(empty, method, {**adapter, key: nearest})
    except ConfigError as error:
        return Sized(name, note=str(error).removeprefix("adapter: "))
    share = trained / budget
    return Sized(name, {key: nearest}, trained, "" if share >= 0.95 else f"{share:.0%} of the budget")


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


def budget_choice(shapes: Shapes, total: int, amount: str) -> Choice:
    """:data:`FIRST_BLOCKS`, and as r the largest multiple of it within ``amount``."""
    limit = budget_parameters(amount, total, lora_parameters(shapes, 1))
    r = _largest_r(shapes, FIRST_BLOCKS, limit) // FIRST_BLOCKS * FIRST_BLOCKS
    if not r:  # r = num_blocks costs what r = 1 costs with one block
        raise _too_small(amount, shapes)
    return choice_of(shapes, total, r, FIRST_BLOCKS)


def choice_of(shapes: Shapes, total: int, r: int, num_blocks: int) -> Choice:
    """What r and num_blocks cost."""
    spent = parameters(shapes, r, num_blocks)
    size = sum(count * adapter_bytes(*shape, *own) for shape, own, count in _fitted(shapes, r, num_blocks))
    bound = min(rank_bound(*shape, block_sizes(*own)) for shape, own, _ in _fitted(shapes, r, num_blocks))
    percent = round(100 * spent / total, 4)
    return Choice(num_blocks, r, spent, percent, size, bound, spent // lora_parameters(shapes, 1))


def shapes_of(empty: PreTrainedModel, targets: tuple[str, ...], model: str) -> Shapes:
    """How often each shape of W occurs among the layers whose name ends in one of ``targets``, of any kind, or among
    all linear ones, and among experts in parameters that are named with their module, such as ``experts.down_proj``."""
    output, layers = empty.get_output_embeddings(), []
    of_parameters = tuple(f".{target}" for target in targets if "." in target)
    for path, module in empty.named_modules():
        if (kind := _kind_of(module)) is not None:
            is_linear = issubclass(kind, Linear) and module is not output
            if path.rpartition(".")[2] in targets or (ALL_LINEAR in targets and is_linear):
                layers.append(kind.shape_of(module))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and f"{path}.{name}".endswith(of_parameters):
                layout = Layout.of(module, name)
                layers += [layout.shape] * layout.count
    if not layers:
        raise DataError(f"model: {model!r} has no layers named {', '.join(targets)} that SMoA adapts; name its own")
    return Counter(layers)


def _kind_of(module: nn.Module) -> Any | None:
    """smoa's class for a layer; None where it has none."""
    return next((kind for base, kind in LAYERS.items() if isinstance(module, base)), None)


def lora_on(empty: PreTrainedModel, adapter: Mapping[str, Any]) -> int:
    """What LoRA of rank 1 trains on the layers that a method's block chooses, by default all linear ones."""
    chosen = {key: adapter[key] for key in ("target_modules", "exclude_modules") if adapter.get(key) is not None}
    return count_trained(empty, LoraConfig(**{"r": 1, "target_modules": ALL_LINEAR, **chosen}))


def trainable_parameters(out_features: int, in_features: int, r: int, num_blocks: int) -> int:
    """Trainable parameters of one layer, `Σ_k r_k(|I_k| + |J_k|)`.

    If K divides m and n this is r(m+n)/K: 1/K of LoRA's at the same r. Raises PartitionError unless K is between 1 and
    min(out_features, in_features, 255).
    """
    check_num_blocks(num_blocks, out_features, in_features)
    rows, columns = block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks)
    return sum(rank * (m + n) for m, n, rank in zip(rows, columns, block_sizes(r, num_blocks), strict=True))


def rank_bound(out_features: int, in_features: int, ranks: Sequence[int]) -> int:
    """Upper bound of rank ΔW, by the ranks r_k of the blocks, if all anchors have full rank:
    `Σ_k min(|I_k|, |J_k|, r_k·min(|I_k|, |J_k|))`."""
    rows, columns = block_sizes(out_features, len(ranks)), block_sizes(in_features, len(ranks))
    return sum(min(m, n) if rank else 0 for m, n, rank in zip(rows, columns, ranks, strict=True))


def adapter_bytes(out_features: int, in_features: int, r: int, num_blocks: int) -> int:
    """Bytes of one layer in a saved adapter: padded float32 factors, a label byte per coordinate, a scale per block."""
    values = r * (-(-out_features // num_blocks) + -(-in_features // num_blocks))
    return 4 * values + out_features + in_features + 4 * num_blocks


def lora_parameters(shapes: Shapes, r: int) -> int:
    """What LoRA of rank r trains on the same layers."""
    return r * sum(count * sum(shape) for shape, count in shapes.items())


def parameters(shapes: Shapes, r: int, num_blocks: int) -> int:
    """Trainable parameters over all layers."""
    return sum(count * trainable_parameters(*shape, *own) for shape, own, count in _fitted(shapes, r, num_blocks))


def _fitted(shapes: Shapes, r: int, num_blocks: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Each shape, its own r and number of blocks, which are smaller in a narrow layer, and how many layers have it."""
    config = SmoaConfig(r=r, num_blocks=num_blocks)
    for shape, count in shapes.items():
        yield shape, (config.rank_of("", shape), config.num_blocks_of("", shape)), count


def _too_small(amount: str, shapes: Shapes) -> ConfigError:
    least = parameters(shapes, 1, 1)
    return ConfigError(f"budget: {amount!r} is too small; the smallest adapter has {least:,} parameters")


def budget_parameters(amount: str, total: int, of_lora: int) -> float:
    """The parameters that ``amount`` is, of a model with ``total``, where LoRA of rank 1 trains ``of_lora``."""
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


def _largest_r(shapes: Shapes, num_blocks: int, limit: float) -> int:
    ranks = range(1, max(max(shape) for shape in shapes) * num_blocks + 1)
    return bisect_right(ranks, limit, key=lambda r: parameters(shapes, r, num_blocks))
