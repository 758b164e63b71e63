"""Where a parameter holds a stack of matrices, such as those of a mixture's experts, and the partition of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from smoa.maths.spectrum import PartitionKind, finite_peak, make_partition

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
