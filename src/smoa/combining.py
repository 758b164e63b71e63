"""`add_weighted_adapter`: a new adapter that is the weighted sum of adapters with one partition.

`cat` is exact: it concatenates the ranks of each block, so `ΔW = Σ w_i ΔW_i`, and the new r is Σ r_i, which must split
evenly over the blocks. `linear` adds the factors, each scaled by √|w_i·s_ik|, as PEFT's LoRA does: r does not change,
and the cross terms are an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from smoa.config import FORMAT, SmoaConfig
from smoa.errors import MergeError
from smoa.kernels.factors import Factors
from smoa.layer import SmoaLayer
from smoa.partition import block_sizes, slices

Combination = Literal["cat", "linear"]
ALIKE = ("num_blocks", "modulation", "ensure_weight_tying")
"""Settings that adapters must share to be combined; their layers too, whatever names them (`check_layer`)."""


def check_combination(
    known: Mapping[str, object], adapters: list[str], weights: list[float], adapter_name: str, combination: str
) -> None:
    """Raise MergeError unless the adapters exist, each has one finite weight, and the new name is free."""
    unknown = set(adapters) - set(known)
    fit = len(adapters) == len(weights) and all(map(math.isfinite, weights))
    if unknown or not adapters or not fit or adapter_name in known:
        raise MergeError(
            f"can't combine {adapters} with weights {weights} into {adapter_name!r}: give existing adapters "
            f"({', '.join(known)}), one finite weight each, and a new name"
        )
    if combination not in get_args(Combination):
        raise MergeError(f"combination_type={combination!r} must be one of {get_args(Combination)}")


def combined_config(configs: list[SmoaConfig], combination: Combination) -> SmoaConfig:
    """Config of the sum."""
    first = configs[0]
    for name in ALIKE:
        values = [getattr(config, name) for config in configs]
        if any(value != values[0] for value in values):
            raise MergeError(f"can't combine adapters of different {name}: {values}")
    for name in ("rank_pattern", "num_blocks_pattern"):
        if any(getattr(config, name) for config in configs):
            raise MergeError(f"can't combine adapters with {name}; give every layer the same r and num_blocks")
    for name in ("modules_to_save", "trainable_token_indices", "bias"):
        if any(getattr(config, name) not in (None, "none", [], {}) for config in configs):
            raise MergeError(f"can't combine adapters with {name}: only updates of adapted layers can be summed")
    ranks = [config.ranks_of() for config in configs]
    if combination == "linear" and len(set(ranks)) > 1:
        raise MergeError(f"combination_type='linear' needs equal block ranks, found {ranks}; use 'cat'")
    total = tuple(map(sum, zip(*ranks, strict=True))) if combination == "cat" else ranks[0]
    if total != block_sizes(sum(total), first.num_blocks):
        raise MergeError(
            f"can't combine adapters of r={[config.r for config in configs]}: their block ranks add up to {total}, no "
            f"even split; combine adapters of which all but one have an r that num_blocks={first.num_blocks} divides"
        )
    own: dict[str, Any] = {"alpha": None, "alpha_pattern": {}, "use_rslora": False, "scale": "paper"}
    return replace(first, r=sum(total), **own, smoa_format=FORMAT)  # its labels come from its parts


def check_layer(name: str, layer: SmoaLayer, adapters: list[str]) -> None:
    """Raise MergeError unless the layer has all these adapters, with the same partition."""
    absent = [adapter for adapter in adapters if adapter not in layer.smoa_A]
    if absent:
        raise MergeError(f"{name}: {', '.join(absent)} doesn't adapt this layer; combine adapters of the same layers")
    for adapter in adapters:
        layer.decided(adapter)
    first, *others = (layer.partition_of(adapter)[:2] for adapter in adapters)
    if not all(torch.equal(rows, first[0]) and torch.equal(cols, first[1]) for rows, cols in others):
        raise MergeError(
            f"{name}: adapters {', '.join(adapters)} have different partitions, so their sum is not a SMoA adapter; "
            "merge them one after another, or convert them to LoRA and combine those"
        )


@torch.no_grad()
def fill_combined(
    layer: SmoaLayer, adapters: list[str], weights: list[float], adapter_name: str, combination: Combination
) -> None:
    """Write labels and factors of the sum into the new adapter of one layer. Its block scales are 1."""
    rows, cols, scale = layer.partition_of(adapters[0])
    layer.set_partition(adapter_name, (rows, cols, torch.ones_like(scale)))
    # PEFT made the factors in the base's dtype, which may be narrower than the parts' dtypes
    dtype = reduce(torch.promote_types, (factor.dtype for name in adapters for factor in layer.factors(name)))
    layer.smoa_A[adapter_name].to(dtype)
    layer.smoa_B[adapter_name].to(dtype)
    fill = _add if combination == "linear" else _concatenate
    stacks = (layer.updates(name) for name in (adapter_name, *adapters))
    for total, *parts in zip(*stacks, strict=True):
        fill(total, parts, [weight * part.scale(dtype) for weight, part in zip(weights, parts, strict=True)])


def _concatenate(total: Factors, parts: list[Factors], scales: list[Tensor]) -> None:
    for *sources, target in zip(*(slices(part.ranks) for part in (*parts, total)), strict=True):
        total.A[target] = torch.cat([part.A[ranks] for part, ranks in zip(parts, sources, strict=True)])
        triples = zip(parts, sources, scales, strict=True)
        total.B[:, target] = torch.cat([part.B[:, ranks] * scale[ranks] for part, ranks, scale in triples], dim=1)


def _add(total: Factors, parts: list[Factors], scales: list[Tensor]) -> None:
    total.A.zero_()
    total.B.zero_()
    for part, scale in zip(parts, scales, strict=True):
        root = scale.abs().sqrt()
        total.A.add_(part.A * root[:, None])
        total.B.add_(part.B * root * scale.sign())
