"""Finds the settings that fit a parameter budget on a model: SMoA's r and num_blocks, and the one key that sizes any
other method. Only shapes are read, no weights."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
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
LARGEST, RISING, SMALLEST, NEAR, MOST = 2**20, 8, 0.85, 0.95, 1.02
"""Of a method that is sized by one key: how many of its values are tried, and up to how many times that of the least
size; below which share of the budget it isn't compared, and which shares are equal."""

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
    limit = budget_parameters(amount, total, shapes)
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
        if (key := find_method(name).budget_key) is not None and key in block:
            raise ConfigError(f"--set {name}.{key}: the number of parameters decides it; leave it out")
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
    empty = empty_model(ModelSection(name=model))
    shapes, total = shapes_of(empty, targets, model), empty.num_parameters()
    budget = budget_parameters(amount, total, shapes)
    wanted: Any = ALL_LINEAR if ALL_LINEAR in targets else list(targets)
    sized = []
    for name in names:
        found = find_method(name).config_class
        block = {} if name.lower() in OTHER_LAYERS or found is None else {"target_modules": wanted}
        block |= {"total_step": 1} if hasattr(found, "total_step") else {}  # AdaLoRA's, which costs nothing
        block |= (settings or {}).get(name.lower(), {})
        sized.append(size_method(empty, name, block, budget))
    return sized


def size_method(empty: PreTrainedModel, name: str, adapter: dict[str, Any], budget: float) -> Sized:
    """The method on ``empty``, a model on the meta device, with the other keys of its block in ``adapter``: the value
    of its budget key at which it trains nearest to ``budget``, at most 2 % more. PEFT counts the parameters."""
    method = find_method(name)
    if method.config_class is None:
        return Sized(name, {}, empty.num_parameters(), "trains all weights")
    key, counts = method.budget_key, dict[int, float]()

    def count(value: int) -> float:
        """Infinite where PEFT refuses the value."""
        if value not in counts:
            try:
                counts[value] = _trained(empty, method, {**adapter, str(key): value})
            except ConfigError:
                counts[value] = math.inf
        return counts[value]

    try:
        if key is None:
            found = _trained(empty, method, adapter)
            return Sized(name, {}, found, f"no whole number sets its size{'' if found else '; needs keys of its own'}")
        sides = sorted({side for shape in adapted_shapes(empty, adapter) for side in shape})
        if key.endswith("block_size"):  # which divides the sides of every layer
            common = math.gcd(*sides)
            divisors = (size for size in range(2, common + 1) if common % size == 0)
            values: Sequence[int] = [size for size in divisors if count(size) < math.inf]
        else:
            step = next((2**power for power in range(7) if count(2**power) < math.inf), 0)
            values = range(step, step * LARGEST, step) if step else ()
        if not values:
            _trained(empty, method, {**adapter, key: 8})
    except ConfigError as error:
        return Sized(name, note=str(error).removeprefix("adapter: "))
    places = _last_within(values, count, budget, sides)
    around = [value for place in places for value in values[max(0, place - 1) : place + 2]]
    near = [value for value in around if 0 < count(value) <= MOST * budget]
    if not near:
        least = min((found for found in counts.values() if 0 < found < math.inf), default=0)
        return Sized(name, note=f"{key} can't make it so small: it trains {least:,} or more")
    chosen = min(near, key=lambda value: abs(count(value) - budget))
    trained = int(count(chosen))
    if places[-1] == len(values) - 1 and count(values[0]) < trained:  # counts of LoKr and others end at whole factors
        chosen = values[bisect_left(values, float(trained), key=count)]
    share = trained / budget
    note = "" if share >= NEAR else f"{share:.0%} of the budget is the nearest that {key} allows"
    return Sized(name, {key: chosen}, trained, note)


def _trained(empty: PreTrainedModel, method: Method, block: dict[str, Any]) -> int:
    """What the method trains; one that looks at weights when it starts is given zeros. Raises ConfigError where the
    block is refused."""
    wanted = method.peft_config(block)
    assert wanted is not None
    try:
        return count_trained(empty, wanted)
    except RuntimeError as error:
        refused = ConfigError("reads the weights when it starts, so it can't be counted without them")
        if "no data" in str(error):
            raise refused from error
    try:
        return count_trained(_with_zeros(copy.deepcopy(empty)), wanted)
    except RuntimeError as error:
        raise refused from error


def _last_within(
    values: Sequence[int], count: Callable[[int], float], budget: float, sides: Iterable[int]
) -> list[int]:
    """The places in ``values`` of the largest counts up to ``budget``, or else before the least. Counts rise all along
    ``values``, most of them in a line, or fall to their end or, as RandLoRA's, to a side of a layer and rise from
    there."""
    first, second = (count(value) for value in (values[0], values[min(1, len(values) - 1)]))
    if first >= second:
        ends = [*(values.index(side) for side in sides if side in values), len(values) - 1]
        least = min(ends, key=lambda place: count(values[place]))
        falling = bisect_left(values, -budget, hi=least, key=lambda value: -count(value))
        if NEAR * budget <= count(values[falling]) <= budget:
            return [falling]
        rising = bisect_right(values, budget, least, min(len(values), RISING * (least + 1)), key=count) - 1
        return [falling, max(least, rising)]
    guess = max(0, int((budget - first) / (second - first)))
    if guess + 1 < len(values) and count(values[guess]) <= budget < count(values[guess + 1]):
        return [guess]
    return [bisect_right(values, budget, key=count) - 1]


def _with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """The model with zeros for weights, which take no memory."""
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
            setattr(module, name, nn.Parameter(zeros, False) if isinstance(value, nn.Parameter) else zeros)
    return model


def budget_choice(shapes: Shapes, total: int, amount: str) -> Choice:
    """:data:`FIRST_BLOCKS`, and as r the largest multiple of it within ``amount``."""
    limit = budget_parameters(amount, total, shapes)
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


def adapted_shapes(empty: PreTrainedModel, adapter: Mapping[str, Any]) -> Shapes:
    """How often each shape of W occurs among the layers that a method's block chooses, by default all linear ones."""
    named = adapter.get("target_modules") or ALL_LINEAR
    config = LoraConfig(target_modules=named, exclude_modules=adapter.get("exclude_modules"))
    chosen: Any = _maybe_include_all_linear_layers(config, empty)
    numbers = {key: adapter.get(key) for key in ("layers_to_transform", "layers_pattern")}
    if numbers["layers_to_transform"] is not None and not isinstance(chosen.target_modules, str):
        ends = {
            name.rpartition(".")[2] for name in chosen.target_modules or ()
        }  # whole names would count in all layers
        vars(chosen).update(numbers, target_modules=ends)
    found = [
        kind.shape_of(module)
        for path, module in empty.named_modules()
        if check_target_module_exists(chosen, path) and (kind := _kind_of(module)) is not None
    ]
    return Counter(found) or shapes_of(empty, (ALL_LINEAR,), "")


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


def budget_parameters(amount: str, total: int, shapes: Shapes) -> float:
    """The parameters that ``amount`` is, of a model with ``total`` and adapted layers of these ``shapes``."""
    text = amount.replace(",", "").replace("_", "").strip().lower()
    unit = lora_parameters(shapes, 1) if text.startswith(LORA) else total / 100 if text.endswith("%") else 1
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
