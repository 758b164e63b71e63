"""`blocks_from_spectrum`: chooses the number of blocks of each layer, and of each parameter of experts.

A layer's K is proportional to the used share of its spectrum, `erank(W) / min(m, n)`. A layer of average share gets
`num_blocks`. erank is the effective rank of Roy and Vetterli (2007): exp of the entropy of the normalized singular
values. The rank of a block does not change, so a layer with more blocks gets more rank for the same number of
parameters. The matrices of experts that one parameter holds have one K, that of their mean share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor
from tqdm.auto import tqdm

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import PartitionError
from smoa.files.loading import incoming
from smoa.layers.distributed import from_rank_zero
from smoa.maths.analysis import effective_rank
from smoa.maths.blocks import MAX_BLOCKS
from smoa.maths.devices import decomposable
from smoa.maths.spectrum import squarable


def name_blocks(config: SmoaConfig, weights: Mapping[str, Callable[[], Tensor]], loads_labels: bool) -> None:
    """With `blocks_from_spectrum`, give `num_blocks_pattern` the K of the targets that it does not name.

    Raises:
        PartitionError: the adapter is being loaded, and its config does not name all layers.
    """
    missing = sorted(name for name in weights if config.chosen_blocks_of(name) is None)
    if not config.blocks_from_spectrum or not missing:
        return
    if loads_labels:
        found = incoming()
        place = "" if found is None else f"{found.file.path.with_name(CONFIG_NAME)}: "
        raise PartitionError(
            f"{place}{missing[0]}: num_blocks_pattern names neither it nor {len(missing) - 1} more, although "
            "blocks_from_spectrum is set; the adapter is for another model, or adapter_config.json is damaged"
        )
    choose = partial(choose_blocks, {name: weights[name] for name in missing}, config.num_blocks)
    chosen = from_rank_zero(choose, everywhere=True)  # every rank must gather sharded weights
    config.num_blocks_pattern = {**config.num_blocks_pattern, **chosen}


def choose_blocks(weights: Mapping[str, Callable[[], Tensor]], num_blocks: int) -> dict[str, int]:
    """Choose K of each layer, by name.

    Args:
        weights: Functions that return the weight of each layer, (out_features, in_features), or of all experts,
            (…, out_features, in_features), by name. Each is called once, and its weight is not kept.
        num_blocks: K of a layer of average share.

    Raises:
        PartitionError: a weight is on the meta device, or has NaN or infinite entries.
    """
    shares: dict[str, float] = {}
    limits: dict[str, int] = {}
    for name, weight in tqdm(weights.items(), desc="SMoA blocks", unit="layer", delay=1, disable=None):
        found = weight()
        limits[name] = min(*found.shape[-2:], MAX_BLOCKS)
        try:
            used = [_used_share(matrix) for matrix in found.reshape(-1, *found.shape[-2:])]
            shares[name] = sum(used) / len(used)
        except PartitionError as error:
            raise PartitionError(f"{name}: {error}") from None
    mean = sum(shares.values()) / max(1, len(shares))
    return {name: min(limits[name], max(1, round(num_blocks * share / (mean or 1)))) for name, share in shares.items()}


def _used_share(weight: Tensor) -> float:
    """Effective rank of a weight, divided by its smaller side."""
    if weight.device.type == "meta":
        raise PartitionError("blocks_from_spectrum needs the base weights; load them before the adapter is added")
    W = squarable(decomposable(weight))
    gram = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
    return effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()) / len(gram)
