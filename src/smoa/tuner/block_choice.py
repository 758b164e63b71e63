"""`blocks_from_spectrum`: how many blocks each layer gets.

K of a layer is in proportion to the share of its spectrum that is in use, `erank(W) / min(m, n)`, and `num_blocks` is
what a layer of average share gets. erank is the effective rank of Roy and Vetterli (2007): exp of the entropy of the
normalised singular values. A block's rank stays, so a layer of more blocks gets more rank for the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smoa.errors import PartitionError
from smoa.maths.analysis import effective_rank
from smoa.maths.blocks import MAX_BLOCKS
from smoa.maths.spectrum import squarable


def choose_blocks(weights: Mapping[str, Callable[[], Tensor]], num_blocks: int) -> dict[str, int]:
    """K of each layer by name, from its weight (m, n), which is asked for once and not kept.

    Raises:
        PartitionError: a weight is on the meta device, or has NaN or infinite entries.
    """
    shares: dict[str, float] = {}
    limits: dict[str, int] = {}
    for name, weight in tqdm(weights.items(), desc="SMoA blocks", unit="layer", delay=1, disable=None):
        found = weight()
        limits[name] = min(*found.shape, MAX_BLOCKS)
        try:
            shares[name] = _used_share(found)
        except PartitionError as error:
            raise PartitionError(f"{name}: {error}") from None
    mean = sum(shares.values()) / max(1, len(shares))
    return {name: min(limits[name], max(1, round(num_blocks * share / (mean or 1)))) for name, share in shares.items()}


def _used_share(weight: Tensor) -> float:
    """The effective rank of a weight as a share of its smaller side."""
    if weight.device.type == "meta":
        raise PartitionError("blocks_from_spectrum needs the base weights; load them before the adapter is added")
    W = squarable(weight)
    gram = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
    return effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()) / len(gram)
