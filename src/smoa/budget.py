"""What an adapter costs and what it can reach, from sizes alone: parameters, bytes on disk, rank bound."""

from __future__ import annotations

from .modulation import split_rank
from .spectrum import block_sizes, check_num_blocks


def _block_shapes(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None
) -> list[tuple[int, int, int]]:
    check_num_blocks(num_blocks, out_features, in_features)
    rows, cols = block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks)
    return list(zip(rows, cols, split_rank(r, num_blocks) if ranks is None else ranks, strict=True))


def trainable_parameters(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None = None
) -> int:
    """`Σ_k r_k(|I_k| + |J_k|)`, which is r(m+n)/K when K divides everything: 1/K of LoRA's at the same r.

    Raises:
        PartitionError: K is not between 1 and min(out_features, in_features, 255).
    """
    return sum(rank * (m + n) for m, n, rank in _block_shapes(out_features, in_features, r, num_blocks, ranks))


def rank_bound(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None = None
) -> int:
    """`Σ_k min(|I_k|, |J_k|, r_k·min(|I_k|, |J_k|))`: rank ΔW can't exceed it, for anchors of full rank."""
    shapes = _block_shapes(out_features, in_features, r, num_blocks, ranks)
    return sum(min(m, n) if rank else 0 for m, n, rank in shapes)


def adapter_bytes(out_features: int, in_features: int, r: int, num_blocks: int, bytes_per_value: int = 4) -> int:
    """Bytes that one layer's adapter saves: both factors, padding included, and a label byte a coordinate."""
    check_num_blocks(num_blocks, out_features, in_features)
    values = r * (-(-out_features // num_blocks) + -(-in_features // num_blocks))
    return values * bytes_per_value + out_features + in_features
