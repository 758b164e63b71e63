"""Computes an adapter's costs from sizes alone: parameters, bytes, memory, bound of the rank.

The functions of one layer raise PartitionError unless K is between 1 and min(out_features, in_features, 255).
"""

from __future__ import annotations

from smoa.kernels.factors import split_rank
from smoa.partition import block_sizes, check_num_blocks


def _block_shapes(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None = None
) -> list[tuple[int, int, int]]:
    check_num_blocks(num_blocks, out_features, in_features)
    rows, cols = block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks)
    return list(zip(rows, cols, split_rank(r, num_blocks) if ranks is None else ranks, strict=True))


def trainable_parameters(out_features: int, in_features: int, r: int, num_blocks: int) -> int:
    """Trainable parameters of one layer, `Σ_k r_k(|I_k| + |J_k|)`.

    If K divides m and n this is r(m+n)/K: 1/K of LoRA's at the same r.
    """
    return sum(rank * (m + n) for m, n, rank in _block_shapes(out_features, in_features, r, num_blocks))


def rank_bound(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None = None
) -> int:
    """Upper bound of rank ΔW if all anchors have full rank: `Σ_k min(|I_k|, |J_k|, r_k·min(|I_k|, |J_k|))`."""
    shapes = _block_shapes(out_features, in_features, r, num_blocks, ranks)
    return sum(min(m, n) if rank else 0 for m, n, rank in shapes)


def adapter_bytes(out_features: int, in_features: int, r: int, num_blocks: int) -> int:
    """Bytes of one layer in a saved adapter: padded float32 factors, a label byte per coordinate, a scale per block."""
    check_num_blocks(num_blocks, out_features, in_features)
    values = r * (-(-out_features // num_blocks) + -(-in_features // num_blocks))
    return 4 * values + out_features + in_features + 4 * num_blocks
