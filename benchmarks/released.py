"""The algorithm that SMoA's authors released, rewritten from its description for comparison.

Each layer keeps float32 copies of its anchors as buffers. Every forward scatters the modulated blocks into a dense ΔW,
which autograd keeps, and multiplies the inputs with it in a second full product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smoa.maths.blocks import Blocks
from smoa.maths.factors import split_rank


class ReleasedLinear(nn.Module):
    """A frozen `nn.Linear` with the released form of SMoA; factors, ΔW and its product are float32."""

    def __init__(self, base: nn.Linear, r: int, partition: Blocks) -> None:
        super().__init__()
        self.base = base
        self.rows = [partition.rows(k) for k in range(partition.num_blocks)]
        self.cols = [partition.cols(k) for k in range(partition.num_blocks)]
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for k, rank in enumerate(split_rank(r, partition.num_blocks)):
            anchor = base.weight.detach()[self.rows[k][:, None], self.cols[k]]
            self.register_buffer(f"anchor_{k}", anchor.float())
            width = len(self.cols[k])
            self.A.append(torch.empty(rank, width, device=anchor.device).uniform_(-(width**-0.5), width**-0.5))
            self.B.append(0.01 * torch.randn(len(self.rows[k]), rank, device=anchor.device))

    def delta_weight(self) -> Tensor:
        """Dense ΔW: (out_features, in_features), float32."""
        delta = self.A[0].new_zeros(self.base.weight.shape)
        for k, (rows, cols) in enumerate(zip(self.rows, self.cols, strict=True)):
            delta[rows[:, None], cols] = self.B[k] @ self.A[k] * self.get_buffer(f"anchor_{k}")
        return delta

    def forward(self, x: Tensor) -> Tensor:
        update = nn.functional.linear(x.float(), self.delta_weight())
        return self.base(x) + update.to(x.dtype)
