"""State of an adapted parameter that holds one matrix for each expert, or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoa.config.adapter_config import SmoaConfig
from smoa.errors import PartitionError, UnsupportedModuleError
from smoa.layers.distributed import refuse_partitioned
from smoa.layers.experts.layout import Layout
from smoa.layers.layer import RANDOM_SIZE, SmoaLayer
from smoa.layers.partition import Pending
from smoa.maths.blocks import Blocks, check_labels
from smoa.maths.factors import Factors, Initialization, factor_shapes, init_factors
from smoa.maths.modulations import MODULATIONS
from smoa.maths.scale import block_scale
from smoa.maths.spectrum_cache import cached_spectral_scores
from smoa.maths.stack import Stack, stacked_blocks
from smoa.maths.stack_partition import ExpertPartition, stack_partition


@dataclass(frozen=True)
class StackPending(Pending):
    """How to make the blocks and block scales of all matrices from the weights."""

    expert_partition: ExpertPartition

    def decide(self, num_blocks: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row labels (P, m), column labels (P, n) and block scales (G, num_blocks), on the CPU.

        Args:
            num_blocks: K.
            weight: W of all experts, (experts, halves, m, n).
        """
        scores_of = cached_spectral_scores
        rows, cols = stack_partition(weight, num_blocks, self.partition, self.expert_partition, scores_of)
        blocks = stacked_blocks(rows.to(weight.device), cols.to(weight.device), num_blocks)
        scales = [
            block_scale(self.scale, self._anchor(matrix, blocks[i % len(blocks)]), blocks[i % len(blocks)])
            for i, matrix in enumerate(matrix for expert in weight for matrix in expert)
        ]
        return rows, cols, torch.stack(scales)

    def _anchor(self, matrix: Tensor, blocks: Blocks) -> Tensor | None:
        return MODULATIONS[self.modulation].anchor(matrix, blocks) if self.scale != "paper" else None


class StackState(SmoaLayer):
    """State of all SMoA adapters on the parameter `parameter_name` of a module; see `SmoaLayer`.

    The parameter holds G matrices of one shape (m, n), see `Layout`. `smoa_A[name]` is a `Linear(⌈n/K⌉ → G·r)` and
    `smoa_B[name]` a `Linear(G·r → ⌈m/K⌉)`: r ranks of the first matrix, then r of the second. The labels are (P, m)
    and (P, n), where P is G, or the matrices of one expert if all experts share a partition. The block scales are
    (G, K).
    """

    parameter_name: str
    layout: Layout
    other_param_names: tuple[str, ...] = (*SmoaLayer.other_param_names, "partitions", "_stack_blocks")

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        self.partitions: dict[str, int] = {}
        self._stack_blocks: dict[str, list[Blocks]] = {}
        SmoaLayer.__init__(self, base_layer)

    def _weight_shape(self) -> tuple[int, int]:
        self.layout = Layout.of(self.get_base_layer(), self.parameter_name)
        return self.layout.shape

    def update_layer(
        self, adapter_name: str, config: SmoaConfig, module: str = "", *, defer_partition: bool = False
    ) -> None:
        """Add an adapter, as `SmoaLayer.update_layer` does."""
        shared = config.expert_partition == "shared"
        self.partitions[adapter_name] = self.layout.halves if shared else self.layout.count
        super().update_layer(adapter_name, config, module, defer_partition=defer_partition)

    def _pending(self, config: SmoaConfig, module: str) -> Pending:
        scale = config.scale_of(module)
        return StackPending(config.partition, config.modulation, scale, config.expert_partition)

    def _add_factors(self, adapter_name: str, init: Initialization) -> None:
        ranks, count = self.ranks[adapter_name], self.layout.count
        (r, width), (height, _) = factor_shapes(self.out_features, self.in_features, ranks)
        A, B = nn.Linear(width, count * r, bias=False), nn.Linear(count * r, height, bias=False)
        size = RANDOM_SIZE / self.scaling[adapter_name]
        with torch.no_grad():
            for part_A, part_B in zip(A.weight.split(r), B.weight.split(r, dim=1), strict=True):
                init_factors(part_A, part_B, self.layout.shape, ranks, init, relative_size=size)
        self.smoa_A[adapter_name], self.smoa_B[adapter_name] = A, B

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self.stored_weight()
        device = device or weight.device
        with self.exact_scales():
            for factor in (self.smoa_A[adapter_name], self.smoa_B[adapter_name]):
                if not any(parameter.device.type == "meta" for parameter in factor.parameters()):
                    factor.to(device, weight.dtype if weight.is_floating_point() else None)
            for buffers in self._saved_buffers():
                buffers[adapter_name] = buffers[adapter_name].to(device)

    def saved_shapes(self, adapter_name: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of A, B, row labels, column labels and block scales in an adapter's file."""
        (r, width), (height, _) = factor_shapes(self.out_features, self.in_features, self.ranks[adapter_name])
        count = self.layout.count
        return (count * r, width), (height, count * r), *self.partition_shapes(adapter_name)

    def partition_shapes(self, adapter_name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of the saved row labels, column labels and block scales."""
        parts, K = self.partitions[adapter_name], len(self.ranks[adapter_name])
        return (parts, self.out_features), (parts, self.in_features), (self.layout.count, K)

    @property
    def matrix_count(self) -> int:
        """G: number of matrices."""
        return self.layout.count

    def all_factors(self, adapter_name: str) -> list[Factors]:
        """The adapter's factors for each of the matrices, as views."""
        stack = self.stack(adapter_name)
        return [stack.update(number).factors for number in range(self.layout.count)]

    def stack(self, adapter_name: str) -> Stack:
        """The adapter's `Stack`, which forms ΔW of each matrix or applies it to x, given the pristine weights."""
        self.decide_partition(adapter_name)
        A, B = self.factors(adapter_name)
        ranks, count = self.ranks[adapter_name], self.layout.count
        scale = self.rank_scale(adapter_name).view(count, -1)
        parts = A.unflatten(0, (count, -1)).unbind(), B.unflatten(1, (count, -1)).unbind(1)
        blocks, modulation = self._stack_blocks[adapter_name], MODULATIONS[self.modulation[adapter_name]]
        return Stack(*parts, ranks, self.scaling[adapter_name], scale, blocks, modulation)

    def stored_weight(self) -> Tensor:
        """The parameter as stored."""
        weight = self.get_base_layer()._parameters.get(self.parameter_name)
        if weight is None:
            raise UnsupportedModuleError(
                f"{self.parameter_name}: FSDP1 has flattened this parameter, of which SMoA needs the shape; use FSDP2"
            )
        return weight

    def matrices(self) -> Tensor:
        """The current weights as a view, (experts, halves, out_features, in_features)."""
        return self.layout.matrices(refuse_partitioned(self.stored_weight()))

    def _derive_orders(self, adapter_name: str, rows: Tensor, cols: Tensor) -> None:
        self._stack_blocks[adapter_name] = stacked_blocks(rows, cols, len(self.ranks[adapter_name]))

    def _has_valid_labels(self, adapter_name: str) -> bool:
        rows, cols, _ = self._saved(adapter_name)
        return rows.device.type != "meta" and all(
            _are_valid(labels, len(self.ranks[adapter_name])) for side in (rows, cols) for labels in side
        )


def _are_valid(labels: Tensor, num_blocks: int) -> bool:
    try:
        check_labels(labels, num_blocks, "labels")
    except PartitionError:
        return False
    return True
