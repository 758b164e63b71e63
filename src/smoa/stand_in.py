"""Stands for a parameter while its module computes: each product with the parameter also adds the adapters' part.

An experts module reads its parameter, picks matrices and multiplies. transformers' "eager" does so expert by expert,
with `linear` or `@`; "batched_mm" takes one matrix for each row, with `bmm`; "grouped_mm" multiplies all at once. A
`StandIn` takes the parameter's place during the call. PyTorch passes it every function that gets it as an argument
(`__torch_function__`). It lets the function compute with the real weights, and adds `x ΔWᵀ`. So every experts
implementation of transformers keeps working, and so do classes with only a forward of their own, such as Llama 4's. A
function that a `StandIn` doesn't know raises an error: an adapter is never left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from smoa.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from smoa.experts import Layout

Branch = Callable[[Tensor, Tensor | int, bool], Tensor]
"""Computes what the adapters add, (rows, out_features of the parameter), for x (rows, in_features).

Given are also where the rows of each expert end, int32 (experts,), or the one expert of all rows. With True, it
computes `x ΔW` instead of `x ΔWᵀ`, for x (rows, out_features).
"""


@dataclass(frozen=True, eq=False)
class StandIn:
    """Stands for a parameter, or for matrices picked from it.

    Args:
        name: Name of the parameter, for errors.
        read: Returns the real parameter.
        layout: How the parameter stores its matrices.
        branch: Computes what the adapters add.
        picked: The picked experts: all, one, or one for each row.
        flipped: Whether the last two dimensions are exchanged.
    """

    name: str
    read: Callable[[], Tensor]
    layout: Layout
    branch: Branch
    picked: Any = None
    flipped: bool = False

    @property
    def tensor(self) -> Tensor:
        """What it stands for."""
        tensor = self.read() if self.picked is None else self.read()[self.picked]
        return tensor.mT if self.flipped else tensor

    @property
    def outputs_last(self) -> bool:
        """Whether the last dimension counts outputs, so that `x @ W` is the product, not `x Wᵀ`."""
        return self.layout.transposed != self.flipped

    def __getitem__(self, picked: Any) -> StandIn:
        if self.picked is not None or self.flipped or not self.layout.is_stack:
            raise self._unknown(f"index [{picked}]")
        return replace(self, picked=picked)

    def transpose(self, first: int, second: int) -> StandIn:
        """The last two dimensions exchanged."""
        if {first % self.tensor.ndim, second % self.tensor.ndim} != {self.tensor.ndim - 2, self.tensor.ndim - 1}:
            raise self._unknown(f"transpose({first}, {second})")
        return replace(self, flipped=not self.flipped)

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT"):
            return self.transpose(-2, -1)
        if name in ("shape", "dtype", "device", "ndim", "size", "dim", "requires_grad"):
            return getattr(self.tensor, name)
        if name == "data_ptr" and self.tensor.device.type == "cpu":  # elsewhere a kernel would read what is there
            return self.tensor.data_ptr
        raise AttributeError(name) if name.startswith("__") else self._unknown(f".{name}")

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]  # `x @ W` comes here if it failed, and hides the error

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = next(value for value in (*args, *kwargs.values()) if isinstance(value, StandIn))
        result = function(
            *(value.tensor if isinstance(value, StandIn) else value for value in args),
            **{key: value.tensor if isinstance(value, StandIn) else value for key, value in kwargs.items()},
        )
        product = _PRODUCTS.get(getattr(function, "__name__", ""))
        added = None if product is None else product(own, *args, **kwargs)
        if added is None:
            raise own._unknown(getattr(function, "__name__", str(function)))
        return result.add_(added.reshape(result.shape))  # nothing else uses the result of a product yet

    def rows(self, x: Tensor, experts: Tensor) -> Tensor:
        """What the adapters add for x (rows, in_features) and the expert of each row."""
        order = experts.argsort(stable=True)
        numbers = torch.arange(self.layout.experts, device=x.device)
        ends = torch.searchsorted(experts[order], numbers, right=True, out_int32=True)
        return self.branch(x[order], ends, False)[order.argsort()]

    def one(self, x: Tensor, backwards: bool) -> Tensor | None:
        """What the adapters add for x (…, in_features) and the one picked expert.

        Args:
            backwards: The product is `x W`, with x (…, out_features). A module may use a parameter of two dimensions
                either way, for `Layout` takes its rows for outputs.
        """
        if backwards and self.layout.is_stack:
            return None
        picked = self.picked if self.layout.is_stack else 0
        if picked is None or (isinstance(picked, Tensor) and picked.numel() != 1) or isinstance(picked, (slice, tuple)):
            return None
        flat = x.reshape(-1, x.shape[-1])
        return self.branch(flat, int(picked), backwards)

    def _unknown(self, what: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(
            f"{self.name}: SMoA can't follow what this model's experts do with the parameter ({what}); choose another "
            'implementation, such as model.set_experts_implementation("grouped_mm") or "eager"'
        )


def _linear(own: StandIn, input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    return own.one(input, backwards=own.outputs_last) if weight is own else None


def _matmul(own: StandIn, input: Any, other: Any) -> Tensor | None:
    return own.one(input, backwards=not own.outputs_last) if other is own else None


def _bmm(own: StandIn, input: Any, mat2: Any) -> Tensor | None:
    """One matrix for each row or, if none are picked, a batch of rows for each expert."""
    if own.outputs_last != (mat2 is own):
        return None
    x: Tensor = input if mat2 is own else mat2.mT
    if own.picked is None:
        ends = torch.arange(1, len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[1]
        added = own.branch(x.flatten(0, 1), ends, False)
    elif isinstance(own.picked, Tensor) and own.picked.ndim == 1 and x.shape[1] == 1:
        added = own.rows(x[:, 0], own.picked)
    else:
        return None
    added = added.view(len(x), x.shape[1], -1)
    return added if mat2 is own else added.mT


def _grouped(own: StandIn, input: Any, weight: Any, offs: Tensor | None = None, **options: Any) -> Tensor | None:
    unusual = any(value is not None for value in options.values())
    if offs is None or unusual or weight is not own or not own.outputs_last or own.picked is not None:
        return None
    added: Tensor = own.branch(input, offs.int(), False)
    return added


_PRODUCTS: dict[str, Callable[..., Tensor | None]] = {
    linear.__name__: _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _bmm,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
