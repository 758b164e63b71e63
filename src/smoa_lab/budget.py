"""Finds the r and num_blocks that fit a parameter budget on a model. Only shapes are read, no weights."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smoa.budget import adapter_bytes, rank_bound, trainable_parameters
from smoa.config import SmoaConfig
from smoa.errors import ConfigError, DataError
from smoa.layers.kinds import kind_of
from smoa.maths.experts import Layout
from smoa_lab.base_models import empty_model
from smoa_lab.config.run import ModelSection

BLOCKS = (1, 2, 4, 8, 16, 32)
FIRST_BLOCKS = 4
"""The number of blocks of a first config."""
ALL_LINEAR = "all-linear"
"""Every linear layer but the output, as PEFT understands it."""
LORA = "lora:"
"""Before a rank: as many parameters as LoRA of that rank trains on the same layers."""

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


def budget_choices(model: str, amount: str, targets: tuple[str, ...], trust_remote_code: bool = False) -> list[Choice]:
    """The largest r within ``amount`` for each number of blocks. ``amount`` is ``"0.1%"`` of the model, a parameter
    count, or ``"lora:8"``, what LoRA of that rank trains.

    Raises:
        ConfigError: ``amount`` cannot be read, or is too small for r = num_blocks = 1.
        DataError: no such model, or none of ``targets`` in it.
    """
    shapes, total = model_shapes(model, targets, trust_remote_code)
    limit = _limit(amount, total, lora_parameters(shapes, 1))
    widest = max(min(shape) for shape in shapes)
    largest = {k: _largest_r(shapes, k, limit) for k in BLOCKS if k <= widest}
    choices = [choice_of(shapes, total, r, k) for k, r in largest.items() if r >= k]
    if not choices:
        raise _too_small(amount, shapes)
    return choices


def budget_choice(shapes: Shapes, total: int, amount: str) -> Choice:
    """:data:`FIRST_BLOCKS`, and as r the largest multiple of it within ``amount``.

    Raises:
        ConfigError: as :func:`budget_choices`.
    """
    limit = _limit(amount, total, lora_parameters(shapes, 1))
    r = _largest_r(shapes, FIRST_BLOCKS, limit) // FIRST_BLOCKS * FIRST_BLOCKS
    if not r:  # r = num_blocks costs what r = 1 costs with one block
        raise _too_small(amount, shapes)
    return choice_of(shapes, total, r, FIRST_BLOCKS)


def choice_of(shapes: Shapes, total: int, r: int, num_blocks: int) -> Choice:
    """What r and num_blocks cost."""
    spent = parameters(shapes, r, num_blocks)
    size = sum(count * adapter_bytes(*shape, *own) for shape, own, count in _fitted(shapes, r, num_blocks))
    bound = min(rank_bound(*shape, *own) for shape, own, _ in _fitted(shapes, r, num_blocks))
    percent = round(100 * spent / total, 4)
    return Choice(num_blocks, r, spent, percent, size, bound, spent // lora_parameters(shapes, 1))


def model_shapes(model: str, targets: tuple[str, ...], trust_remote_code: bool = False) -> tuple[Shapes, int]:
    """Shapes of the layers whose name ends in one of ``targets``, and the model's number of parameters."""
    empty = empty_model(ModelSection(name=model, trust_remote_code=trust_remote_code))
    return shapes_of(empty, targets, model), sum(parameter.numel() for parameter in empty.parameters())


def shapes_of(empty: PreTrainedModel, targets: tuple[str, ...], model: str) -> Shapes:
    """How often each shape of W occurs among the layers whose name ends in one of ``targets``, of any kind, or among
    all linear ones, and among experts in parameters that are named with their module, such as ``experts.down_proj``.

    Raises:
        DataError: there are none.
    """
    output, layers = empty.get_output_embeddings(), []
    of_parameters = tuple(f".{target}" for target in targets if "." in target)
    for path, module in empty.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D) and module is not output
        kind = kind_of(module)
        if kind is not None and (path.rpartition(".")[2] in targets or (ALL_LINEAR in targets and is_linear)):
            layers.append(kind.shape_of(module))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and f"{path}.{name}".endswith(of_parameters):
                layout = Layout.of(module, name)
                layers += [layout.shape] * layout.count
    if not layers:
        raise DataError(
            f"model: {model!r} has no layers named {', '.join(targets)} that SMoA adapts; name its own with "
            "--target-modules"
        )
    return Counter(layers)


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


def _limit(amount: str, total: int, of_lora: int) -> float:
    """Parameters; ``of_lora`` is what one rank of LoRA has."""
    text = amount.replace(",", "").replace("_", "").strip().lower()
    unit = of_lora if text.startswith(LORA) else total / 100 if text.endswith("%") else 1
    try:
        limit = float(text.removeprefix(LORA).removesuffix("%")) * unit
    except ValueError as error:
        raise ConfigError(
            f"budget: {amount!r} is neither a percentage such as 0.1%, nor a parameter count, nor LoRA's of a rank, "
            "such as lora:8"
        ) from error
    if not 0 < limit < total:
        raise ConfigError(f"budget: {amount!r} must be more than 0 and less than the model's {total:,} parameters")
    return limit


def _largest_r(shapes: Shapes, num_blocks: int, limit: float) -> int:
    ranks = range(1, max(max(shape) for shape in shapes) * num_blocks + 1)
    return bisect_right(ranks, limit, key=lambda r: parameters(shapes, r, num_blocks))
