"""SMoA on a parameter that holds the matrices of experts: their adapters, forward and merge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from smoa.adapter_names import CALL, OPEN
from smoa.config import SmoaConfig
from smoa.distributed import gather, whole_shape
from smoa.errors import UnsupportedModuleError
from smoa.kernels.one_product import Update
from smoa.kernels.stack import Side, Stack
from smoa.layer import SmoaLayer
from smoa.stand_in import StandIn

EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""What the matrices of experts were called before transformers stacked them."""
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
        """The layout of the parameter `name` of `module`, of two or three dimensions."""
        shape = whole_shape(module, name)
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


class ParamWrapper(SmoaLayer):
    """SMoA on one parameter of a module, named as PEFT's own, which `_inject_parameters` looks for.

    The parameter holds G matrices of one shape (m, n), see `Layout`. The labels are (G, m) and (G, n), the block scales
    (G, K). Wrappers of several parameters of one module are nested, as in PEFT's LoRA. No second copy of the parameter
    is made, not in a merge.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SmoaConfig, module: str, **options: Any
    ) -> None:
        self.parameter_name = module.rpartition(".")[2]
        super().__init__(base_layer, adapter_name, config, module, **options)

    def _weight_shape(self) -> tuple[int, int]:
        parameter, shape = self.stored_weight(), whole_shape(self.get_base_layer(), self.parameter_name)
        if len(shape) not in (2, 3) or not parameter.is_floating_point() or parameter.itemsize == 1:
            raise UnsupportedModuleError(
                f"target_parameters: {self.parameter_name} has shape {shape} and {parameter.dtype}; only "
                "matrices, or a stack of them, that aren't quantized can be adapted"
            )
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
        return self.layout.matrices(self.stored_weight())

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
        own, scaling = self.decided(adapter_name), self.scaling[adapter_name]
        sides = cast(tuple[Side, Side], own.blocks)
        return Stack(*self.factors(adapter_name), own.ranks, scaling, own.rank_scale, *sides, own.modulation)

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
        if OPEN and (call := CALL.get()) is not None:
            if own := self.adapters.keys() & {*call.names}:
                raise ValueError(
                    f"adapter_names: {sorted(own)[0]!r} has adapted experts, which see all samples at once"
                )
            return self.base_layer(x, *args, **kwargs)
        active = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(active, x, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler can't see through a stand-in
    def _adapted(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the experts compute, with a stand-in in the parameter's place, which an attribute of its name shadows."""
        gather(self, *active)
        attributes, stacks = self.get_base_layer().__dict__, {name: self.stack(name) for name in active}
        branch = partial(self.added_output, stacks)
        attributes[self.parameter_name] = StandIn(self.parameter_name, self.stored_weight, self.layout, branch)
        try:  # what was compiled for the layer's own calls has no guard on a stand-in
            return self.base_layer._call_impl(x, *args, **kwargs)
        finally:
            del attributes[self.parameter_name]

    def added_output(self, stacks: dict[str, Stack], x: Tensor, ends: Tensor | int, backwards: bool) -> Tensor:
        """What adapters add to x (rows, in_features), in the order of the parameter's outputs.

        `ends` are where the rows of each expert end, int32 (experts,), or the one expert of all rows. With
        `backwards` it is `x ΔW`, for x (rows, out_features).
        """
        matrices = self.matrices()
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


def wrapper_of(module: nn.Module, parameter_name: str) -> ParamWrapper | None:
    """The wrapper of a parameter among those of a module, if there is one; PEFT ≤ 0.20 doesn't look for it."""
    while isinstance(module, ParamWrapper) and module.parameter_name != parameter_name:
        module = module.base_layer
    return module if isinstance(module, ParamWrapper) else None


def warn_of_experts(model: nn.Module, config: SmoaConfig) -> None:
    """Warn that the experts of a mixture stay as they are if target_modules asks for all layers, or for theirs."""
    stacks = [
        (place, name)
        for place, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if "expert" in place.lower() and len(whole_shape(module, name)) == 3
    ]
    takes_all = str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    named = (check_target_module_exists(config, f"{place}.{name}") for place, _ in stacks for name in EXPERTS)
    if stacks and not config.target_parameters and config.target_modules and (takes_all or any(named)):
        wanted = sorted({f"{'.'.join(place.split('.')[-2:])}.{name}" for place, name in stacks})
        warnings.warn(
            "the experts of this mixture are parameters and not adapted by target_modules. To adapt them too, add "
            f"target_parameters={wanted}",
            stacklevel=2,
        )
