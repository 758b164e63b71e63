"""Partitions of a stack of matrices: one for each matrix, or one that all experts share.

A shared partition has as few decompositions as one expert. It sorts input coordinates by the scores of `[W_1; …; W_E]`,
the experts' matrices on top of each other, and output coordinates by those of `[W_1 … W_E]`, side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smoa.maths.blocks import Blocks
from smoa.maths.devices import decomposable
from smoa.maths.spectrum import PartitionKind, finite_peak, gram_scores, make_partition, squarable

ExpertPartition = Literal["each", "shared"]
Scores = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def stack_partition(
    matrices: Tensor, num_blocks: int, kind: PartitionKind, expert_partition: ExpertPartition, scores_of: Scores
) -> tuple[Tensor, Tensor]:
    """Row labels (P, out_features) and column labels (P, in_features), uint8 on the CPU, with a progress bar.

    Args:
        matrices: W of all experts, (E, H, out_features, in_features).
        num_blocks: K.
        kind: How to assign coordinates to blocks.
        expert_partition: "each" gives every matrix its own, P = E·H. "shared" gives one to each of the H, P = H.
        scores_of: `smoa.maths.spectrum.spectral_scores`, or a cache of it.

    Raises:
        PartitionError: K does not fit, or a weight has NaN or infinite entries.
    """
    finite_peak(matrices)
    each = [matrix[None] for expert in matrices for matrix in expert]  # views, which `flatten` may not give
    stacks = each if expert_partition == "each" else matrices.transpose(0, 1)
    hidden = True if kind != "spectral" else None  # None: shown on a terminal only
    bar = tqdm(stacks, desc="SMoA partitions of experts", unit="matrix", delay=1, disable=hidden, leave=False)
    found = [_partition(stack, num_blocks, kind, scores_of) for stack in bar]
    rows, cols = ([getattr(blocks, side).cpu() for blocks in found] for side in ("row_labels", "col_labels"))
    return torch.stack(rows), torch.stack(cols)


def _partition(stack: Tensor, num_blocks: int, kind: PartitionKind, scores_of: Scores) -> Blocks:
    """Blocks of one matrix, or those that a stack of them shares."""
    if len(stack) > 1:
        scores_of = partial(_shared_scores, stack)
    return make_partition(stack[0], num_blocks, kind, scores_of)


def _shared_scores(stack: Tensor, first: Tensor, precise: bool) -> tuple[Tensor, Tensor]:
    """Scores of the rows of `[W_1 … W_E]`, and of the columns of `[W_1; …; W_E]`, from `Σ W Wᵀ` and `Σ Wᵀ W`."""
    weights = squarable(decomposable(stack))
    rows, cols = (sum(W @ W.mT for W in side) for side in (weights, weights.mT))
    return gram_scores(rows, precise), gram_scores(cols, precise)
