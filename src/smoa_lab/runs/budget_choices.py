"""Finds the r and num_blocks that fit a parameter budget on a model. Only shapes are read, no weights."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import ConfigError, DataError
from smoa.maths.budget import adapter_bytes, rank_bound, trainable_parameters
from smoa_lab.training.base_models import prepare_packaged_model
from smoa_lab.training.packaged_models import PACKAGED_MODELS

BLOCKS = (1, 2, 4, 8, 16, 32)

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
    """For each number of blocks the largest r within ``amount``: ``"0.1%"`` of the model, or a parameter count.

    Raises:
        ConfigError: ``amount`` cannot be read, or is too small for r = num_blocks = 1.
        DataError: no such model, or none of ``targets`` in it.
    """
    shapes, total = model_shapes(model, targets, trust_remote_code)
    limit = _limit(amount, total)
    lora_cost = sum(count * sum(shape) for shape, count in shapes.items())
    choices = []
    for num_blocks in (k for k in BLOCKS if k <= max(min(shape) for shape in shapes)):
        r = _largest_r(shapes, num_blocks, limit)
        if r >= num_blocks:
            spent = parameters(shapes, r, num_blocks)
            size = sum(count * adapter_bytes(*shape, *own) for shape, own, count in _fitted(shapes, r, num_blocks))
            bound = min(rank_bound(*shape, *own) for shape, own, _ in _fitted(shapes, r, num_blocks))
            choices.append(Choice(num_blocks, r, spent, round(100 * spent / total, 4), size, bound, spent // lora_cost))
    if not choices:
        raise ConfigError(
            f"budget: {amount!r} is too small; the smallest adapter has {parameters(shapes, 1, 1):,} parameters"
        )
    return choices


def model_shapes(model: str, targets: tuple[str, ...], trust_remote_code: bool = False) -> tuple[Shapes, int]:
    """Shapes of the layers whose name ends in one of ``targets``, and the model's number of parameters."""
    packaged = model in PACKAGED_MODELS
    name = str(prepare_packaged_model(model) if packaged else Path(model).expanduser())
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"budget: cannot read the config of {model!r}: {error}") from error
    layers = [
        (layer.out_features, layer.in_features)
        for path, layer in empty.named_modules()
        if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in targets
    ]
    if not layers:
        raise DataError(
            f"budget: {model!r} has no linear layers named {', '.join(targets)}; name its own with --targets"
        )
    return Counter(layers), sum(parameter.numel() for parameter in empty.parameters())


def parameters(shapes: Shapes, r: int, num_blocks: int) -> int:
    """Trainable parameters over all layers."""
    return sum(count * trainable_parameters(*shape, *own) for shape, own, count in _fitted(shapes, r, num_blocks))


def _fitted(shapes: Shapes, r: int, num_blocks: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Each shape, its own r and number of blocks, which are smaller in a narrow layer, and how many layers have it."""
    config = SmoaConfig(r=r, num_blocks=num_blocks)
    for shape, count in shapes.items():
        yield shape, (config.rank_of("", shape), config.num_blocks_of("", shape)), count


def _limit(amount: str, total: int) -> float:
    text = amount.replace(",", "").replace("_", "").strip()
    try:
        limit = float(text.removesuffix("%")) * (total / 100 if text.endswith("%") else 1)
    except ValueError as error:
        raise ConfigError(f"budget: {amount!r} is neither a percentage such as 0.1% nor a parameter count") from error
    if not 0 < limit < total:
        raise ConfigError(f"budget: {amount!r} must be more than 0 and less than the model's {total:,} parameters")
    return limit


def _largest_r(shapes: Shapes, num_blocks: int, limit: float) -> int:
    ranks = range(1, max(max(shape) for shape in shapes) * num_blocks + 1)
    return bisect_right(ranks, limit, key=lambda r: parameters(shapes, r, num_blocks))
