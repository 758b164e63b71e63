r"""The updates of a stack of matrices of one shape, such as the experts of a mixture, and where a parameter holds them:

    ΔW_g[I_gk, J_gk] = s_gk·(B_gk A_gk) ⊙ W_g[I_gk, J_gk],   g = 0 … G−1   (arXiv:2605.21147)

Every matrix has a partition of its own: `Stack.update(g)` is its `Update`. The matrices share K, the ranks and α/r. A
product concerns only the matrices that some row of x belongs to. Their diagonal blocks are formed one matrix after the
other, and formed again for the backward, so that only x and the factors are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from smoa.maths.blocks import Blocks, Orders
from smoa.maths.factors import Factors
from smoa.maths.kernels.batched import batched_backward, batched_forward
from smoa.maths.kernels.operators import Gradients, is_transformed, recomputed
from smoa.maths.scale import ModulationKind
from smoa.maths.spectrum import PartitionKind, finite_peak, make_partition
from smoa.maths.update import Update

Scores = Callable[[Tensor, bool], tuple[Tensor, Tensor]]

HALVED = "gate_up_proj"
"""Name of the parameters that hold two matrices for each expert."""
TRANSPOSED = ("Llama4TextExperts", "GptOssExperts")
INTERLEAVED = ("GptOssExperts",)


@dataclass(frozen=True)
class Layout:
    """How a parameter stores the matrices of experts.

    | parameter      | shape      | models                              | an expert's matrices             |
    |----------------|------------|-------------------------------------|----------------------------------|
    | `down_proj`    | (E, m, n)  | Qwen3-MoE, Mixtral, OLMoE, DeepSeek | one                              |
    | `gate_up_proj` | (E, 2m, n) | the same                            | gate, then up                    |
    | `gate_up_proj` | (E, n, 2m) | Llama 4                             | transposed: gate, then up        |
    | `gate_up_proj` | (E, n, 2m) | gpt-oss                             | transposed: gate and up by turns |
    | any            | (m, n)     | a Linear's weight                   | one, of one expert               |

    transformers marks its classes with `is_transposed` and `is_concatenated`. `TRANSPOSED` names those without a mark.

    Args:
        experts: E.
        halves: H, matrices of each expert.
        out_features: m of one matrix.
        in_features: n of one matrix.
        transposed: An expert's matrices are stored as (n, H·m), not as (H·m, n).
        interleaved: The outputs of the H matrices take turns.
        is_stack: The parameter has three dimensions, not two.
    """

    experts: int
    halves: int
    out_features: int
    in_features: int
    transposed: bool = False
    interleaved: bool = False
    is_stack: bool = True

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Layout:
        """The layout of the parameter `name` of `module`: two or three dimensions, also while it is sharded."""
        parameter = getattr(module, name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if len(shape) == 2:
            return cls(1, 1, *shape, is_stack=False)
        kind = type(module).__name__.removeprefix("FSDP")  # which FSDP2 puts before the name
        transposed = bool(getattr(module, "is_transposed", kind in TRANSPOSED))
        interleaved = not getattr(module, "is_concatenated", kind not in INTERLEAVED)
        out_features, in_features = reversed(shape[1:]) if transposed else shape[1:]
        halves = 2 if name == HALVED and out_features % 2 == 0 else 1
        return cls(shape[0], halves, out_features // halves, in_features, transposed, interleaved and halves > 1)

    @property
    def count(self) -> int:
        """G: number of matrices."""
        return self.experts * self.halves

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of one matrix."""
        return self.out_features, self.in_features

    def matrices(self, parameter: Tensor) -> Tensor:
        """All matrices as a view: (experts, halves, out_features, in_features)."""
        stack = parameter if self.is_stack else parameter[None]
        stack = stack.mT if self.transposed else stack
        sizes = (self.out_features, self.halves) if self.interleaved else (self.halves, self.out_features)
        split: Tensor = stack.unflatten(1, sizes)
        return split.transpose(1, 2) if self.interleaved else split

    def join(self, outputs: Tensor) -> Tensor:
        """Outputs of the halves (rows, halves, out_features) as the parameter's own: (rows, halves·out_features)."""
        return (outputs.transpose(1, 2) if self.interleaved else outputs).flatten(1)


class Run(NamedTuple):
    """Neighboring rows of x that belong to one expert."""

    expert: int
    rows: slice


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of G = E·H matrices: H of each of E experts, the matrix h of expert e being number e·H + h.

    Args:
        A: (G·r, ⌈n/K⌉), r ranks of the first matrix, then r of the second.
        B: (⌈m/K⌉, G·r).
        ranks: r_k of every block, the same in each matrix.
        scaling: α/r.
        rank_scale: The part of the scale that comes from the weights, (G, r) float32.
        blocks: Blocks of each matrix.
        modulation: As in `Update`.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: float
    rank_scale: Tensor
    blocks: Sequence[Blocks]
    modulation: ModulationKind = "hadamard"

    def slots(self, number: int) -> slice:
        """The ranks of one matrix."""
        r = sum(self.ranks)
        return slice(number * r, (number + 1) * r)

    def update(self, number: int) -> Update:
        """ΔW of one matrix."""
        slots, of_ranks, blocks = self.slots(number), self.rank_scale[number], self.blocks[number]
        factors = Factors(self.A[slots], self.B[:, slots], self.ranks, self.scaling, of_ranks, blocks)
        return Update(factors, self.modulation)

    def transposed(self) -> Stack:
        """The updates of the transposed matrices, which are ΔWᵀ."""
        return replace(self, A=self.B.T, B=self.A.T, blocks=[blocks.transposed() for blocks in self.blocks])

    def apply(self, x: Tensor, matrices: Tensor, runs: Sequence[Run]) -> Tensor:
        """`x ΔWᵀ` with the matrices of each row's expert: (rows, H, out_features), zero for rows outside all runs.

        Differentiable in x and the factors. For the backward it keeps them, and no block of W or ΔW.

        Args:
            x: (rows, in_features).
            matrices: Pristine W of all experts, (E, H, out_features, in_features).
            runs: The rows of each expert.
        """
        route = _OfRuns(tuple(runs))
        if self.modulation == "none" or is_transformed(x):  # without M, autograd keeps the products of x with A only
            return route.plain(self, x, matrices)
        return recomputed(route, self, x, matrices)


@dataclass(frozen=True)
class _OfRuns:
    """The route of a stack: batched products, one matrix after the other."""

    runs: tuple[Run, ...]

    def _parts(self, stack: Stack, matrices: Tensor) -> Iterator[tuple[slice, int, int, Update, Tensor]]:
        """Rows, half, number, update and weight of each matrix that some row belongs to."""
        halves = matrices.shape[1]
        for expert, rows in self.runs:
            for half in range(halves):
                number = expert * halves + half
                yield rows, half, number, stack.update(number), matrices[expert, half]

    def _room(self, x: Tensor, *shape: int) -> Tensor:
        """Room for the rows of x: zero, unless the runs fill all of it."""
        filled = sum(rows.stop - rows.start for _, rows in self.runs) == len(x)
        return x.new_empty(len(x), *shape) if filled else x.new_zeros(len(x), *shape)

    def forward(self, stack: Stack, x: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
        output = self._room(x, *matrices.shape[1:3])
        for rows, half, _, update, matrix in self._parts(stack, matrices):
            output[rows, half] = batched_forward(update.factors, x[rows], matrix)
        return output

    def plain(self, stack: Stack, x: Tensor, matrices: Tensor) -> Tensor:
        output = x.new_zeros(len(x), *matrices.shape[1:3])
        for rows, half, _, update, matrix in self._parts(stack, matrices):
            output[rows, half] = update.apply(x[rows], matrix)
        return output

    def backward(self, stack: Stack, g: Tensor, x: Tensor, matrices: Tensor, needs_x: bool) -> Gradients:
        grad_x, grad_A, grad_B = self._room(x, x.shape[1]), torch.zeros_like(stack.A), torch.zeros_like(stack.B)
        for rows, half, number, update, matrix in self._parts(stack, matrices):
            slots = stack.slots(number)
            gradients = batched_backward(update.factors, g[rows, half], x[rows], matrix, needs_x)
            of_x, grad_A[slots], grad_B[:, slots] = gradients
            if needs_x:
                grad_x[rows] = of_x if half == 0 else of_x.add_(grad_x[rows])
        return grad_x, grad_A, grad_B


def stacked_blocks(row_labels: Tensor, col_labels: Tensor, num_blocks: int) -> list[Blocks]:
    """Blocks of each of G matrices; their orders are int32, because there may be many matrices.

    Args:
        row_labels: uint8 (G, out_features).
        col_labels: uint8 (G, in_features).
        num_blocks: K.
    """
    orders = [order.int().unbind() for order in Orders.of(row_labels, col_labels)]
    ascending = [(side[:, 1:] >= side[:, :-1]).all(dim=1) for side in (row_labels, col_labels)]
    both = ascending[0] & ascending[1]
    contiguous = [False] * len(both) if both.device.type == "meta" else both.tolist()
    rows = zip(row_labels.unbind(), col_labels.unbind(), zip(*orders, strict=True), contiguous, strict=True)
    return [Blocks(row, col, num_blocks, Orders(*order), flag) for row, col, order, flag in rows]


def stack_partition(
    matrices: Tensor, num_blocks: int, kind: PartitionKind, scores_of: Scores, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Row labels (G, out_features) and column labels (G, in_features), uint8 on the CPU, with a progress bar.

    Args:
        matrices: W of all experts, (E, H, out_features, in_features).
        num_blocks: K.
        kind: How to assign coordinates to blocks.
        scores_of: `smoa.maths.spectrum.spectral_scores`, or a cache of it.
        generator: As in `make_partition`.

    Raises:
        PartitionError: K does not fit, or a weight has NaN or infinite entries.
    """
    finite_peak(matrices)
    each = [matrix for expert in matrices for matrix in expert]  # views, which `flatten` may not give
    hidden = True if kind != "spectral" else None  # None: shown on a terminal only
    bar = tqdm(each, desc="SMoA partitions of experts", unit="matrix", delay=1, disable=hidden, leave=False)
    partitions = [make_partition(matrix, num_blocks, kind, scores_of, generator) for matrix in bar]
    rows, cols = ([getattr(blocks, side).cpu() for blocks in partitions] for side in ("row_labels", "col_labels"))
    return torch.stack(rows), torch.stack(cols)
