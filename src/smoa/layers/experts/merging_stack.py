"""Merges adapters into a parameter of experts and out of it, one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smoa.layers.experts.stack_state import StackState
from smoa.layers.merging import MergingLayer, check_finite
from smoa.layers.undo import DiagonalBlocks
from smoa.maths.update import Update


class MergingStack(StackState, MergingLayer):
    """A `StackState` whose adapters can be merged. No second copy of the parameter is made."""

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer, parameter_name)
        self._pristine: list[list[DiagonalBlocks]] = []
        """The diagonal blocks of each matrix, for each merged adapter."""

    def pristine_matrix(self, number: int) -> Tensor:
        """W of one matrix before any merge, (out_features, in_features); a copy only while adapters are merged."""
        matrix = self.matrix(number)
        if not self._pristine:
            return matrix
        matrix = matrix.clone()
        for kept in self._pristine:
            kept[number].write_to(matrix)
        return matrix

    def matrix(self, number: int) -> Tensor:
        """The current weight of one matrix as a view, (out_features, in_features)."""
        expert, half = divmod(number, self.layout.halves)
        return self.matrices()[expert, half]

    def pristine_weight(self) -> Tensor:
        """W of all matrices before any merge, (experts, halves, out_features, in_features); see `pristine_matrix`."""
        if not self._pristine:
            return self.matrices()
        parts = [self.pristine_matrix(number) for number in range(self.layout.count)]
        return torch.stack(parts).view(self.layout.experts, self.layout.halves, *self.layout.shape)

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Update]]:
        """Every matrix that the adapter changes: its name ("gate_up_proj[3].0"), pristine weight and update."""
        stack, halves = self.stack(adapter_name), self.layout.halves
        for number in range(self.layout.count):
            name = f"[{number // halves}]" if self.layout.is_stack else ""
            half = f".{number % halves}" if halves > 1 else ""
            yield f"{self.parameter_name}{name}{half}", self.pristine_matrix(number), stack.update(number)

    def delta(self, adapter_name: str) -> Tensor:
        """Dense ΔW of all matrices, (experts, halves, out_features, in_features), float32 or wider."""
        stack = self.stack(adapter_name)
        parts = [stack.update(number).delta(self.pristine_matrix(number)) for number in range(self.layout.count)]
        return torch.stack(parts).view(self.layout.experts, self.layout.halves, *self.layout.shape)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the parameter's shape (PEFT's contract)."""
        delta = self.delta(adapter)
        stored = torch.empty_like(self.stored_weight(), dtype=delta.dtype)
        self.layout.matrices(stored).copy_(delta)
        return stored

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts linear layers only; `smoa convert` converts experts too."""
        return False

    def merged_matrices(self, adapter_names: list[str]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, pristine W and `W + Σ ΔW` of one matrix after the other, rounded once."""
        stacks = [self.stack(name) for name in adapter_names]
        for number in range(self.layout.count):
            pristine = self.pristine_matrix(number)
            total = sum((stack.update(number).delta(pristine) for stack in stacks), pristine.new_zeros(()))
            # Keep the exact bits where nothing is added: -0 + 0 is 0, and `unmerge` restores diagonal blocks only.
            yield number, pristine, torch.where(total == 0, pristine, (total + pristine).to(pristine.dtype))

    @torch.no_grad()
    def _check_merged(self, names: list[str]) -> None:
        for _, _, merged in self.merged_matrices([*self.merged_adapters, *names]):
            check_finite(merged, names)

    def _merge(self, names: list[str], safe_merge: bool) -> None:
        if safe_merge:
            self._check_merged(names)
        stacks = [self.stack(name) for name in names]
        kept: list[list[DiagonalBlocks]] = [[] for _ in names]
        for number, pristine, merged in self.merged_matrices([*self.merged_adapters, *names]):
            for blocks, stack in zip(kept, stacks, strict=True):
                blocks.append(DiagonalBlocks.read_from(pristine, stack.update(number).factors.blocks))
            self.matrix(number).copy_(merged)
        self._pristine += kept

    def _restore_pristine(self) -> None:
        for number in range(self.layout.count):
            self.matrix(number).copy_(self.pristine_matrix(number))
        self._pristine.clear()
