"""SMoA on a parameter of experts: construction and forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smoa.config.adapter_config import SmoaConfig
from smoa.layers.adapter_module import AdapterModule
from smoa.layers.distributed import gather_for
from smoa.layers.experts.merging_stack import MergingStack
from smoa.layers.experts.stand_in import StandIn
from smoa.maths.stack import Run, Stack

_LOCK = threading.Lock()


class ParamWrapper(AdapterModule, MergingStack):
    """SMoA on one parameter of a module, named as PEFT's own, which `_inject_parameters` looks for.

    Wrappers of several parameters of one module are nested, as in PEFT's LoRA.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: SmoaConfig,
        key: str,
        defer_partition: bool = False,
    ) -> None:
        super().__init__()
        MergingStack.__init__(self, base_layer, parameter_name)
        self._active_adapter = adapter_name
        self._in_call: dict[int, dict[str, Stack]] = {}
        self.update_layer(adapter_name, config, key, defer_partition=defer_partition)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The experts' output, with `W + ΔW` of the active adapters in the place of each `W`."""
        if adapter_names is not None:
            raise ValueError(
                f"{self.parameter_name}: adapter_names can't be used with adapted experts, which see the tokens of all "
                "samples at once; use one adapter for the whole batch"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        for name in active:
            self.decide_partition(name)
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(active, x, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler can't see through a stand-in
    def _adapted(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._standing_in(active):
            return self.base_layer(x, *args, **kwargs)

    @contextmanager
    def _standing_in(self, active: list[str]) -> Iterator[None]:
        """Put a stand-in into the parameter's place, which an attribute of the same name shadows."""
        attributes, thread = self.get_base_layer().__dict__, threading.get_ident()
        if hasattr(self, "ds_id"):  # ZeRO-3 knows this layer
            gather_for(self, [self.stored_weight(), *self.smoa_A.parameters(), *self.smoa_B.parameters()])
        self._in_call[thread] = {name: self.stack(name) for name in active}
        with _LOCK:
            attributes[self.parameter_name] = StandIn(
                self.parameter_name, self.stored_weight, self.layout, self.branch_output
            )
        try:
            yield
        finally:
            with _LOCK:
                del self._in_call[thread]
                if not self._in_call:
                    del attributes[self.parameter_name]

    def branch_output(self, x: Tensor, runs: list[Run], backwards: bool = False) -> Tensor:
        """What the adapters of this call add to x (rows, in_features), in the order of the parameter's outputs.

        With `backwards` it is `x ΔW`, for x (rows, out_features).
        """
        matrices, stacks = self.matrices(), self._in_call[threading.get_ident()]
        if backwards:
            matrices, stacks = matrices.mT, {name: stack.transposed() for name, stack in stacks.items()}
        parts = [stack.apply(self._input(name, x, stack), matrices, runs) for name, stack in stacks.items()]
        return self.layout.join(sum(parts[1:], parts[0]))

    def _input(self, adapter_name: str, x: Tensor, stack: Stack) -> Tensor:
        x = self.smoa_dropout[adapter_name](x)
        if not stack.modulation.anchors:
            return self._cast_input_dtype(x, stack.A[0].dtype)
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

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
        return f"smoa.{super().__repr__()}".replace("(", f"(\n  parameter_name={self.parameter_name!r},", 1)
