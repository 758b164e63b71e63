"""`add_weighted_adapter`: one new adapter that is a weighted sum of adapters of one partition.

`cat` is exact: within each block the ranks stand side by side, so `ΔW = Σ w_i ΔW_i` and the new r is Σ r_i. `linear`
adds the factors themselves, √|w_i·s_i| on either side, as PEFT's LoRA does: r stays, the cross terms are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import MergeError
from smoa.layers.layer import SmoaLayer

Combination = Literal["cat", "linear"]


def check_combination(
    known: Mapping[str, object], adapters: list[str], weights: list[float], adapter_name: str, combination: str
) -> None:
    """Raise MergeError unless these are existing adapters with one weight each, and the sum's name is free."""
    unknown = set(adapters) - set(known)
    if unknown or not adapters or len(adapters) != len(weights) or adapter_name in known:
        raise MergeError(
            f"can't combine {adapters} with weights {weights} into {adapter_name!r}: give existing adapters "
            f"({', '.join(known)}), one weight each, and a new name"
        )
    if combination not in get_args(Combination):
        raise MergeError(f"combination_type={combination!r} must be one of {get_args(Combination)}")


def combined_config(configs: list[SmoaConfig], combination: Combination) -> SmoaConfig:
    """Config of the sum.

    Raises:
        MergeError: the adapters differ in what a sum can't mix.
    """
    first = configs[0]
    for name in ("num_blocks", "modulation", "target_modules"):
        values = [getattr(config, name) for config in configs]
        if any(value != values[0] for value in values):
            raise MergeError(f"can't combine adapters of different {name}: {values}")
    for name in ("rank_pattern", "num_blocks_pattern"):
        if any(getattr(config, name) for config in configs):
            raise MergeError(f"can't combine adapters with {name}; give every layer the same r and num_blocks")
    for name in ("modules_to_save", "trainable_token_indices", "bias"):
        if any(getattr(config, name) not in (None, "none", [], {}) for config in configs):
            raise MergeError(f"can't combine adapters with {name}: only the updates of adapted layers have a sum")
    ranks = [config.ranks_of() for config in configs]
    if combination == "linear" and len(set(ranks)) > 1:
        raise MergeError(f"combination_type='linear' needs equal block ranks, found {ranks}; use 'cat'")
    total = [sum(column) for column in zip(*ranks, strict=True)] if combination == "cat" else list(ranks[0])
    return replace(
        first,
        r=sum(total),
        block_ranks=total,
        alpha=None,
        alpha_pattern={},
        normalize_anchor=False,
        normalized_alpha={},
    )


def check_same_labels(name: str, layer: SmoaLayer, adapters: list[str]) -> None:
    """Raise MergeError unless the layer has all these adapters, and they have one partition."""
    absent = [adapter for adapter in adapters if adapter not in layer.smoa_A]
    if absent:
        raise MergeError(f"{name}: {', '.join(absent)} doesn't adapt this layer; combine adapters of the same layers")
    first = layer.partition(adapters[0])
    for other in map(layer.partition, adapters[1:]):
        same_rows = torch.equal(first.row_labels, other.row_labels)
        if not same_rows or not torch.equal(first.col_labels, other.col_labels):
            raise MergeError(
                f"{name}: adapters {', '.join(adapters)} have different partitions, so their sum is no SMoA adapter; "
                "merge them one after another, or convert them to LoRA and combine those"
            )


@torch.no_grad()
def fill_combined(
    layer: SmoaLayer, adapters: list[str], weights: list[float], adapter_name: str, combination: Combination
) -> None:
    """Write labels and factors of the sum into the fresh adapter `adapter_name` of one layer."""
    layer.share_partition(adapters[0], adapter_name)
    parts = [layer.factors(name) for name in adapters]
    # PEFT has made the factors in the base's dtype, which may be narrower than those of the parts
    dtype = reduce(torch.promote_types, (factor.dtype for part in parts for factor in part))
    layer.smoa_A[adapter_name].to(dtype)
    layer.smoa_B[adapter_name].to(dtype)
    A, B = layer.factors(adapter_name)
    scaled = [weight * layer.scaling[name] for name, weight in zip(adapters, weights, strict=True)]
    if combination == "linear":
        _add(A, B, parts, scaled)
    else:
        slices = [layer.layout[name].rank_slices() for name in (*adapters, adapter_name)]
        _concatenate(A, B, parts, scaled, slices)


def _concatenate(
    A: Tensor, B: Tensor, parts: list[tuple[Tensor, Tensor]], scaled: list[float], slices: list[list[slice]]
) -> None:
    """`slices`: the ranks of each block in every part and, last, in the sum."""
    for *sources, target in zip(*slices, strict=True):
        A[target] = torch.cat([part[ranks] for (part, _), ranks in zip(parts, sources, strict=True)])
        columns = [part[:, ranks] * s for (_, part), ranks, s in zip(parts, sources, scaled, strict=True)]
        B[:, target] = torch.cat(columns, dim=1)


def _add(A: Tensor, B: Tensor, parts: list[tuple[Tensor, Tensor]], scaled: list[float]) -> None:
    A.zero_()
    B.zero_()
    for (part_A, part_B), s in zip(parts, scaled, strict=True):
        root = abs(s) ** 0.5
        A.add_(part_A, alpha=root)
        B.add_(part_B, alpha=root if s >= 0 else -root)
