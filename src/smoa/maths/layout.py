"""Where a parameter holds a stack of matrices, such as those of a mixture's experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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
