"""A device without float64 and without decompositions, as Apple's MPS. It computes on the CPU, under another name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from smoa.spectrum import decomposition_device

DEVICE = torch.device("mps", 0)
LACKING = ("linalg_", "_linalg_", "svd", "geqrf")
HAS = ("linalg_vector_norm",)


class Elsewhere(Tensor):
    """A tensor of the device. `held` is the CPU's tensor with its entries."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        if held.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        found = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE, requires_grad=held.requires_grad
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> "Elsewhere":  # PyTorch's own asks a build with MPS for the device
        return Elsewhere(self.held[tree_map_only(Elsewhere, lambda tensor: tensor.held, index)])

    def __float__(self) -> float:
        return float(self.held)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"Elsewhere({self.held})"


class _Factories(TorchDispatchMode):
    """Makes tensors on the device, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE.type:
            return _call(func, args, kwargs)
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
    asked = kwargs.get("device")
    here = DEVICE.type if asked is None else torch.device(asked).type
    if name.startswith(LACKING) and not name.startswith(HAS):
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    found = func(*args, **kwargs)
    return found if here == "cpu" else tree_map_only(Tensor, Elsewhere, found)


@contextmanager
def limited_device() -> Iterator[torch.device]:
    """A device that refuses float64 and decompositions while the context is open."""
    decomposition_device.cache_clear()
    try:
        with _Factories():
            yield DEVICE
    finally:
        decomposition_device.cache_clear()
