r"""The updates of a stack of matrices of one shape, such as the experts of a mixture:

    ΔW_g[I_gk, J_gk] = s_gk·(B_gk A_gk) ⊙ W_g[I_gk, J_gk],   g = 0 … G−1   (arXiv:2605.21147)

Every matrix is one of its own: `Stack.update(g)` is its `Update`. The matrices share K, the ranks and α/r. A product
concerns only the matrices that some row of x belongs to. Their diagonal blocks are formed one matrix after the other,
and formed again for the backward, so that only x and the factors are kept.

Every matrix has a partition of its own, or all experts share one, which has as few decompositions as one expert. A
shared partition sorts input coordinates by the scores of `[W_1; …; W_E]`, the experts' matrices on top of each other,
and output coordinates by those of `[W_1 … W_E]`, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smoa.errors import UnsupportedModuleError
from smoa.maths.blocks import Blocks, Orders
from smoa.maths.factors import Factors
from smoa.maths.kernels.batched import batched_backward, batched_forward
from smoa.maths.kernels.operators import is_transformed, needs_plain_gradients, plain_gradients, without_tensors
from smoa.maths.scale import MODULATIONS, Modulation
from smoa.maths.spectrum import PartitionKind, decomposable, finite_peak, gram_scores, make_partition, squarable
from smoa.maths.update import Update

ExpertPartition = Literal["each", "shared"]
Scores = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


class Run(NamedTuple):
    """Neighboring rows of x that belong to one expert."""

    expert: int
    rows: slice


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of G = E·H matrices: H of each of E experts, the matrix h of expert e being number e·H + h.

    Args:
        A: (r, ⌈n/K⌉) of each matrix.
        B: (⌈m/K⌉, r) of each matrix.
        ranks: r_k of every block, the same in each matrix.
        scaling: α/r.
        rank_scale: The part of the scale that comes from the weights, (G, r) float32.
        blocks: Blocks of each matrix or, if fewer, of each h: the same for all experts.
        modulation: How the anchors are made.
    """

    A: Sequence[Tensor]
    B: Sequence[Tensor]
    ranks: tuple[int, ...]
    scaling: float
    rank_scale: Tensor
    blocks: Sequence[Blocks]
    modulation: Modulation = MODULATIONS["hadamard"]

    def update(self, number: int) -> Update:
        """ΔW of one matrix."""
        blocks = self.blocks[number % len(self.blocks)]
        rank_scale = self.rank_scale[number]
        factors = Factors(self.A[number], self.B[number], self.ranks, self.scaling, rank_scale, blocks)
        return Update(factors, self.modulation)

    def transposed(self) -> Stack:
        """The updates of the transposed matrices, which are ΔWᵀ.

        Raises:
            UnsupportedModuleError: the anchors are noise, which the transposed matrices would have other draws of.
        """
        if self.modulation.anchors and not self.modulation.by_weight:
            raise UnsupportedModuleError(
                "modulation='noise' can't adapt a parameter W that its module multiplies as x W; use another modulation"
            )
        A, B = [part.T for part in self.B], [part.T for part in self.A]
        return replace(self, A=A, B=B, blocks=[blocks.transposed() for blocks in self.blocks])

    def apply(self, x: Tensor, matrices: Tensor, runs: Sequence[Run]) -> Tensor:
        """`x ΔWᵀ` with the matrices of each row's expert: (rows, H, out_features), zero for rows outside all runs.

        Differentiable in x and the factors. For the backward it keeps them, and no block of W or ΔW.

        Args:
            x: (rows, in_features).
            matrices: Pristine W of all experts, (E, H, out_features, in_features).
            runs: The rows of each expert.
        """
        halves = matrices.shape[1]
        numbers = [run.expert * halves + half for run in runs for half in range(halves)]
        updates = [self.update(number) for number in numbers]
        if not self.modulation.anchors or is_transformed(x):  # without M, autograd keeps the products of x with A only
            return _apply(updates, x, matrices, runs)
        factors = [part for number in numbers for part in (self.A[number], self.B[number])]
        output: Tensor = _StackBranch.apply(x, matrices, updates, runs, *factors)  # type: ignore[no-untyped-call]
        return output


def stacked_blocks(row_labels: Tensor, col_labels: Tensor, num_blocks: int) -> list[Blocks]:
    """Blocks of each of P matrices; their orders are int32, because there may be many matrices.

    Args:
        row_labels: uint8 (P, out_features).
        col_labels: uint8 (P, in_features).
        num_blocks: K.
    """
    orders = [order.int().unbind() for order in Orders.of(row_labels, col_labels)]
    ascending = [(side[:, 1:] >= side[:, :-1]).all(dim=1) for side in (row_labels, col_labels)]
    both = ascending[0] & ascending[1]
    contiguous = [False] * len(both) if both.device.type == "meta" else both.tolist()
    rows = zip(row_labels.unbind(), col_labels.unbind(), zip(*orders, strict=True), contiguous, strict=True)
    return [Blocks(row, col, num_blocks, Orders(*order), flag) for row, col, order, flag in rows]


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
    partitions = [_partition(stack, num_blocks, kind, scores_of) for stack in bar]
    rows, cols = ([getattr(blocks, side).cpu() for blocks in partitions] for side in ("row_labels", "col_labels"))
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


def _apply(updates: Sequence[Update], x: Tensor, matrices: Tensor, runs: Sequence[Run]) -> Tensor:
    halves = matrices.shape[1]
    output = x.new_zeros(len(x), halves, matrices.shape[2])
    for i, (expert, rows) in enumerate(runs):
        for half in range(halves):
            output[rows, half] = updates[i * halves + half].apply(x[rows], matrices[expert, half])
    return output


class _StackBranch(torch.autograd.Function):
    """`x ΔWᵀ` of the matrices in `runs`, whose factors follow as (A, B) of one matrix after the other.

    A Function and not a custom operator, because an operator's schema has no list of updates.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, updates: list[Update], runs: list[Run], *factors: Tensor) -> Any:
        ctx.save_for_backward(x, matrices, *factors)
        ctx.updates, ctx.runs = [replace(update, factors=without_tensors(update.factors)) for update in updates], runs
        halves = matrices.shape[1]
        output = _empty_or_zero(x, runs, halves, matrices.shape[2])
        for i, (expert, rows) in enumerate(runs):
            for half in range(halves):
                factors_of, anchor = _parts(updates[i * halves + half], matrices[expert, half])
                output[rows, half] = batched_forward(factors_of, x[rows], anchor)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, matrices, *factors = ctx.saved_tensors
        if needs_plain_gradients(g):
            pairs = zip(factors[::2], factors[1::2], strict=True)
            updates = [_with_factors(update, *pair) for update, pair in zip(ctx.updates, pairs, strict=True)]
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            of_x, *of_factors = plain_gradients(
                lambda: _apply(updates, x, matrices, ctx.runs), [x, *factors], needed, g
            )
            return of_x, None, None, None, *of_factors
        needs_x, halves = ctx.needs_input_grad[0], matrices.shape[1]
        grad_x = _empty_or_zero(x, ctx.runs, x.shape[1]) if needs_x else None
        of_factors = []
        for i, (expert, rows) in enumerate(ctx.runs):
            for half in range(halves):
                number = i * halves + half
                update = _with_factors(ctx.updates[number], *factors[2 * number : 2 * number + 2])
                factors_of, anchor = _parts(update, matrices[expert, half])
                part, *grads = batched_backward(factors_of, g[rows, half], x[rows], anchor, needs_x)
                of_factors += grads
                if grad_x is not None:
                    grad_x[rows] = part if half == 0 else part.add_(grad_x[rows])
        return grad_x, None, None, None, *of_factors


def _empty_or_zero(x: Tensor, runs: Sequence[Run], *shape: int) -> Tensor:
    """Room for the rows of x: zero, unless the runs fill all of it."""
    filled = sum(rows.stop - rows.start for _, rows in runs) == len(x)
    return x.new_empty(len(x), *shape) if filled else x.new_zeros(len(x), *shape)


def _parts(update: Update, matrix: Tensor) -> tuple[Factors, Tensor]:
    anchor = update.anchor(matrix)
    assert anchor is not None, "without an anchor, autograd computes the gradients"
    return update.factors, anchor


def _with_factors(update: Update, A: Tensor, B: Tensor) -> Update:
    return replace(update, factors=replace(update.factors, A=A, B=B))
