"""What an adapter costs and what it can reach, from sizes alone: parameters, bytes on disk, memory, rank bound."""

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


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds on all devices together, in the order in which they appear.

    `weights` of the frozen base, `factors` of the adapter (float32, as PEFT keeps them), their `gradients`, AdamW's two
    moments, and with every decoder layer checkpointed the `checkpoints`: its input, 16 bits an entry.
    """

    weights: int
    factors: int
    gradients: int
    optimizer: int
    checkpoints: int

    @property
    def total(self) -> int:
        """Their sum: what one layer needs while it is recomputed, and the logits, come on top."""
        return self.weights + self.factors + self.gradients + self.optimizer + self.checkpoints


def training_memory(
    linear: int, other: int, trainable: int, layers: int, hidden_size: int, tokens: int, four_bit: bool = False
) -> TrainingMemory:
    """Memory from counts alone.

    Args:
        linear: Parameters of the decoder's linear layers, which 4 bits hold in NF4 with nested quantisation.
        other: All other parameters of the base; 16 bits each.
        trainable: Parameters of the adapter.
        tokens: Batch times length.
    """
    # NF4: half a byte an entry, a byte for each 64 entries, and a float32 for each 256 of those bytes.
    per_entry = 0.5 + 1 / 64 + 4 / (64 * 256) if four_bit else 2
    weights = round(linear * per_entry) + 2 * other
    return TrainingMemory(weights, 4 * trainable, 4 * trainable, 8 * trainable, 2 * layers * hidden_size * tokens)
