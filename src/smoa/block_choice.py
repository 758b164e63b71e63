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

from .analysis import effective_rank
from .errors import PartitionError
from .spectrum import MAX_BLOCKS


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
        shares[name] = _used_share(name, found)
    mean = sum(shares.values()) / max(1, len(shares))
    return {name: min(limits[name], max(1, round(num_blocks * share / (mean or 1)))) for name, share in shares.items()}


def _used_share(name: str, weight: Tensor) -> float:
    """The effective rank of a weight as a share of its smaller side."""
    if weight.device.type == "meta":
        raise PartitionError(
            f"{name}: blocks_from_spectrum needs the base weights; load them before the adapter is added"
        )
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    W = W / W.abs().max().clamp_min(torch.finfo(W.dtype).tiny)  # squares neither overflow nor vanish
    if not torch.isfinite(W).all():
        raise PartitionError(
            f"{name}: the weight has NaN or infinite entries, so it has no spectrum; load finite weights"
        )
    gram = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
    return effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()) / len(gram)
