r"""The updates of a stack of matrices of one shape, such as the experts of a mixture, and where a parameter holds them:

    ΔW_g[I_gk, J_gk] = s_gk·(B_gk A_gk) ⊙ W_g[I_gk, J_gk],   g = 0 … G−1   (arXiv:2605.21147)

Every matrix has a partition of its own: `Stack.update(g)` is its `Update`. The matrices share K, the ranks and α/r. So
the blocks of all experts are padded to one shape, and multiplied by one grouped product. They are formed again for the
backward, so that only x and the factors are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from smoa.maths.blocks import Blocks, Orders, slices
from smoa.maths.factors import Factors
from smoa.maths.kernels.grouped import Grouped, Side
from smoa.maths.kernels.operators import is_transformed, recomputed
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


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of G = E·H matrices: H of each of E experts, the matrix h of expert e being number e·H + h.

    Args:
        A: (G·r, ⌈n/K⌉), r ranks of the first matrix, then r of the second.
        B: (⌈m/K⌉, G·r).
        ranks: r_k of every block, the same in each matrix.
        scaling: α/r.
        rank_scale: The part of the scale that comes from the weights, (G, r) float32.
        rows: The outputs of each matrix.
        cols: The inputs of each matrix.
        modulation: As in `Update`.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scaling: float
    rank_scale: Tensor
    rows: Side
    cols: Side
    modulation: ModulationKind = "hadamard"

    def blocks(self, number: int) -> Blocks:
        """The blocks of one matrix."""
        rows, cols = (side.labels.flatten(0, 1)[number] for side in (self.rows, self.cols))
        return Blocks(rows, cols, len(self.ranks), Orders.of(rows, cols))

    def update(self, number: int) -> Update:
        """ΔW of one matrix."""
        own = slice(number * sum(self.ranks), (number + 1) * sum(self.ranks))
        of_ranks, blocks = self.rank_scale[number], self.blocks(number)
        factors = Factors(self.A[own], self.B[:, own], self.ranks, self.scaling, of_ranks, blocks)
        return Update(factors, self.modulation)

    def transposed(self) -> Stack:
        """The updates of the transposed matrices, which are ΔWᵀ."""
        return replace(self, A=self.B.T, B=self.A.T, rows=self.cols, cols=self.rows)

    def of_expert(self, number: int) -> Stack:
        """The updates of one expert's matrices."""
        halves, r, expert = self.rows.order.shape[1], sum(self.ranks), slice(number, number + 1)
        own, ranks = (slice(number * size, (number + 1) * size) for size in (halves, halves * r))
        rows, cols = (Side(*(table[expert] for table in side)) for side in (self.rows, self.cols))
        return replace(self, A=self.A[ranks], B=self.B[:, ranks], rank_scale=self.rank_scale[own], rows=rows, cols=cols)

    def apply(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        """`x ΔWᵀ` with the matrices of each row's expert: (rows, H, out_features), undefined after the last end.

        Differentiable in x and the factors. For the backward it keeps them, and no block of W or ΔW.

        Args:
            x: (rows, in_features), sorted by expert.
            matrices: Pristine W of all experts, (E, H, out_features, in_features).
            ends: int32 (E,), where the rows of each expert end.
        """
        route = Grouped(ends)
        return route.plain(self, x, matrices) if is_transformed(x) else recomputed(route, self, x, matrices)

    def by_block(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, Bᵀ and their scale by half, block and expert, (H, K, E, rank, …), padded by zeros; differentiable."""
        scale = self.rank_scale.to(torch.promote_types(self.A.dtype, torch.float32)) * self.scaling
        A, B = self._padded(self.A, self.cols), self._padded(self.B.T, self.rows)
        return A, B, self._by_block(scale.view(-1, 1))

    def _by_block(self, of_ranks: Tensor) -> Tensor:
        (E, H, K, _), ranks, rank = self.rows.order.shape, self.ranks, max(self.ranks)
        if len(set(ranks)) > 1:
            sources = [own.start + i if i < own.stop - own.start else -1 for own in slices(ranks) for i in range(rank)]
            of_ranks = F.pad(of_ranks.unflatten(0, (E * H, -1)), (0, 0, 0, 1))[:, sources].flatten(0, 1)
        return of_ranks.view(E, H, K, rank, -1).permute(1, 2, 0, 3, 4)

    def _padded(self, factor: Tensor, side: Side) -> Tensor:
        own, padding = self._by_block(factor), side.order.shape[3] - factor.shape[1]
        if larger := side.labels.shape[2] % len(self.ranks):  # the other blocks have a column of padding already
            first, rest = F.pad(own[:, :larger], (0, padding)), F.pad(own[:, larger:, ..., :-1], (0, padding + 1))
            return torch.cat([first, rest], 1)
        return F.pad(own, (0, padding)) if padding else own


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
