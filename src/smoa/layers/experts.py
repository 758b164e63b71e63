"""SMoA on a parameter that holds the matrices of experts: their adapters, forward and merge."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from smoa.config import SmoaConfig
from smoa.errors import UnsupportedModuleError
from smoa.layers.by_name import OPEN, call_of
from smoa.layers.distributed import gather, onloaded_for, refuse_partitioned
from smoa.layers.layer import SmoaLayer
from smoa.layers.stand_in import StandIn
from smoa.maths.layout import Layout
from smoa.maths.stack import Side, Stack
from smoa.maths.update import Update

_LOCK = threading.Lock()


class ParamWrapper(SmoaLayer):
    """SMoA on one parameter of a module, named as PEFT's own, which `_inject_parameters` looks for.

    The parameter holds G matrices of one shape (m, n), see `Layout`. The labels are (G, m) and (G, n), the block scales
    (G, K). Wrappers of several parameters of one module are nested, as in PEFT's LoRA. No second copy of the parameter
    is made, not in a merge.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SmoaConfig, module: str, **options: Any
    ) -> None:
        self.parameter_name = self.weight_name = module.rpartition(".")[2]
        self._in_call: dict[int, dict[str, Stack]] = {}
        super().__init__(base_layer, adapter_name, config, module, **options)
        self.rows_unknown = f"{self.parameter_name} has adapted experts, which see the tokens of all samples at once"

    def _weight_shape(self) -> tuple[int, int]:
        self.layout = Layout.of(self.get_base_layer(), self.parameter_name)
        self.halves, self.matrix_count = self.layout.halves, self.layout.count
        return self.layout.shape

    # Weights and updates.

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

    def base_weight(self, number: int = 0) -> Tensor:
        """The current weight of one matrix as a view, (out_features, in_features)."""
        expert, half = divmod(number, self.layout.halves)
        return self.matrices()[expert, half]

    def pristine_weight(self) -> Tensor:
        """W of all matrices before any merge, (experts, halves, out_features, in_features); see `pristine_matrix`."""
        if self.pristine is None:
            return self.matrices()
        matrices = [self.pristine_matrix(number) for number in range(self.layout.count)]
        return torch.stack(matrices).view_as(self.matrices())

    def stack(self, adapter_name: str) -> Stack:
        """The adapter's `Stack`, which forms ΔW of each matrix or applies it to x, given the pristine weights."""
        own, derived = self.adapters[adapter_name], self.derived(adapter_name)
        sides = cast(tuple[Side, Side], derived.blocks)
        scaling = self.scaling[adapter_name]
        return Stack(*self.factors(adapter_name), own.ranks, scaling, derived.rank_scale, *sides, own.modulation)

    def updates(self, adapter_name: str) -> list[Update]:
        """The adapter's `Update` of each matrix."""
        stack = self.stack(adapter_name)
        return [stack.update(number) for number in range(self.layout.count)]

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Update]]:
        """Every matrix that the adapter changes: its name, as "gate_up_proj[3].0", its pristine weight and update."""
        for number, (_, pristine, update) in enumerate(super().parts(adapter_name)):
            expert, half = divmod(number, self.layout.halves)
            name = f"{self.parameter_name}[{expert}]" if self.layout.is_stack else self.parameter_name
            yield f"{name}.{half}" if self.layout.halves > 1 else name, pristine, update

    def delta(self, adapter_name: str) -> Tensor:
        """Dense ΔW of all matrices, (experts, halves, out_features, in_features), float32 or wider."""
        deltas = [update.delta(pristine) for _, pristine, update in self.parts(adapter_name)]
        return torch.stack(deltas).view_as(self.matrices())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the parameter's shape (PEFT's contract)."""
        delta = self.delta(adapter)
        stored = torch.empty_like(self.stored_weight(), dtype=delta.dtype)
        self.layout.matrices(stored).copy_(delta)
        return stored

    def _write_matrix(self, matrix: Tensor, number: int) -> None:
        self.base_weight(number).copy_(matrix)

    # Forward.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The experts' output, with `W + ΔW` of the active adapters in the place of each `W`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        by_names = bool(OPEN) and call_of(self) is not None  # none of which has adapted experts
        active = [] if self.disable_adapters or self.merged or by_names else self._present(self.active_adapters)
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(active, x, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler can't see through a stand-in
    def _adapted(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base: Any = self.get_base_layer()  # code that was compiled for its own calls has no guard on a stand-in
        offloaded = base.__dict__.get("_old_forward")  # by accelerate, which loads the parameter before it calls this
        if offloaded is None:
            with self._standing_in(active):
                return self.base_layer._call_impl(x, *args, **kwargs)

        def loaded(*args: Any, **kwargs: Any) -> Any:
            with onloaded_for(self, active), self._standing_in(active):
                return offloaded(*args, **kwargs)

        base._old_forward = loaded
        try:
            return self.base_layer._call_impl(x, *args, **kwargs)
        finally:
            base._old_forward = offloaded

    @contextmanager
    def _standing_in(self, active: list[str]) -> Iterator[None]:
        """Put a stand-in into the parameter's place, which an attribute of the same name shadows."""
        attributes, thread = self.get_base_layer().__dict__, threading.get_ident()
        gather(self, *self.smoa_A)
        self._in_call[thread] = {name: self.stack(name) for name in active}
        with _LOCK:
            name = self.parameter_name
            attributes[name] = StandIn(name, self.stored_weight, self.layout, self.added_output)
        try:
            yield
        finally:
            with _LOCK:
                del self._in_call[thread]
                if not self._in_call:
                    del attributes[self.parameter_name]

    def added_output(self, x: Tensor, ends: Tensor | int, backwards: bool) -> Tensor:
        """What the adapters of this call add to x (rows, in_features), in the order of the parameter's outputs.

        `ends` are where the rows of each expert end, int32 (experts,), or the one expert of all rows. With
        `backwards` it is `x ΔW`, for x (rows, out_features).
        """
        matrices, stacks = self.matrices(), self._in_call.get(threading.get_ident())
        if stacks is None:  # the call of another thread put the stand-in there
            _, halves, m, n = matrices.shape
            return x.new_zeros(len(x), n if backwards else halves * m)
        if backwards:
            matrices, stacks = matrices.mT, {name: stack.transposed() for name, stack in stacks.items()}
        if isinstance(ends, int):
            matrices, stacks = matrices[ends, None], {name: stack.of_expert(ends) for name, stack in stacks.items()}
            ends = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        parts = [stack.apply(self.branch_input(x, name), matrices, ends) for name, stack in stacks.items()]
        return self.layout.join(sum(parts[1:], parts[0]))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module, with the adapters of all wrapped parameters merged if asked (PEFT's contract)."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if isinstance(self.base_layer, ParamWrapper):
            return self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(\n  parameter_name={self.parameter_name!r},", 1)
