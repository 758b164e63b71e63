"""Computes an adapter's costs from sizes alone: parameters, bytes, memory, bound of the rank.

The functions of one layer raise PartitionError unless K is between 1 and min(out_features, in_features, 255).
"""

from __future__ import annotations

from dataclasses import dataclass

from smoa.maths.blocks import block_sizes, check_num_blocks
from smoa.maths.factors import split_rank


def _block_shapes(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None
) -> list[tuple[int, int, int]]:
    check_num_blocks(num_blocks, out_features, in_features)
    rows, cols = block_sizes(out_features, num_blocks), block_sizes(in_features, num_blocks)
    return list(zip(rows, cols, split_rank(r, num_blocks) if ranks is None else ranks, strict=True))


def trainable_parameters(
    out_features: int, in_features: int, r: int, num_blocks: int, ranks: tuple[int, ...] | None = None
) -> int:
    """Trainable parameters of one layer, `Σ_k r_k(|I_k| + |J_k|)`.

    If K divides m and n this is r(m+n)/K: 1/K of LoRA's at the same r.
    """
    return sum(rank * (m + n) for m, n, rank in _block_shapes(out_features, in_features, r, num_blocks, ranks))


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


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training allocates on all devices together, in the order of allocation.

    Args:
        weights: The frozen base.
        factors: The adapter's factors, float32 as in PEFT.
        gradients: The gradients of the factors.
        optimizer: AdamW's two moments.
        checkpoints: The input of each decoder layer, 16 bits per entry, if all layers are checkpointed.
    """

    weights: int
    factors: int
    gradients: int
    optimizer: int
    checkpoints: int

    @property
    def total(self) -> int:
        """Sum of the above. The logits, and what one layer needs while it is recomputed, are not included."""
        return self.weights + self.factors + self.gradients + self.optimizer + self.checkpoints


def training_memory(
    linear: int, other: int, trainable: int, layers: int, hidden_size: int, tokens: int, four_bit: bool = False
) -> TrainingMemory:
    """Estimate the memory of training from counts alone.

    Args:
        linear: Parameters of the decoder's linear layers, 16 bits each.
        other: All other parameters of the base, 16 bits each.
        trainable: Parameters of the adapter.
        layers: Number of decoder layers.
        hidden_size: Width of the decoder.
        tokens: Batch size times length.
        four_bit: Store the linear layers as NF4 with nested quantization.
    """
    # NF4: half a byte per entry, one byte per 64 entries, and one float32 per 256 of those bytes.
    per_entry = 0.5 + 1 / 64 + 4 / (64 * 256) if four_bit else 2
    weights = round(linear * per_entry) + 2 * other
    return TrainingMemory(weights, 4 * trainable, 4 * trainable, 8 * trainable, 2 * layers * hidden_size * tokens)
