"""Counts the operations that a device would start: those that move or compute data, views and allocations aside."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from smoa import partition
from smoa.spectrum import decomposition_device

# Counts the operations that a device would start: those that move or compute data, views and allocations aside.


STARTS_NOTHING = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "narrow", "permute", "select", "slice", "split"),
    *("split_with_sizes", "mT", "t", "transpose", "unsqueeze", "view", "view_as", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "promote_types", "result_type", "resolve_conj"),
    "resolve_neg",
}
"""Operations of `aten` that make a view, an allocation or a decision."""
CALLS_OTHERS = {
    *("to", "_to_copy", "clone", "contiguous", "reshape", "flatten", "linear", "matmul", "ones_like", "zeros_like"),
}
"""Operations that are made of others, which are counted instead."""
BY_INDEX = ("index", "_index", "gather", "scatter", "take", "masked", "embedding")
SORTS_OR_WAITS = {"sort", "argsort", "bincount", "unique", "_unique2", "nonzero", "item", "_local_scalar_dense"}


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lists every such operation of the context when it closes, those inside operators and NumPy's copies included."""
    found: list[str] = []
    original = partition.numpy.take

    def take(*args: object, **kwargs: object) -> object:
        found.append("index_select")  # which NumPy replaces on a CPU
        return original(*args, **kwargs)  # type: ignore[call-overload]

    with monkeypatch.context() as patched, profile(activities=[ProfilerActivity.CPU]) as profiled:
        patched.setattr(partition.numpy, "take", take)
        yield found
    events = [event for event in profiled.events() if _starts(event) and not _inside_another(event)]
    found.extend(event.name.removeprefix("aten::") for event in events)


@contextmanager
def gathers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Those that gather or scatter entries by index."""
    found: list[str] = []
    with launches(monkeypatch) as every:
        yield found
    found.extend(name for name in every if name.startswith(BY_INDEX))


def count(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations of one call."""
    with launches(monkeypatch) as found:
        step()
    return found


def _starts(event: FunctionEvent) -> bool:
    name = event.name.removeprefix("aten::")
    return event.name.startswith("aten::") and name not in STARTS_NOTHING | CALLS_OTHERS


def _inside_another(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _starts(parent):
            return True
        parent = parent.cpu_parent
    return False


# Follows the memory of tensors as a device's allocator does: what is alive at once, beside what was there before.


class LiveBytes(TorchDispatchMode):
    """`peak` is the largest sum of bytes of the storages that were made in the context and lived at the same time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[UntypedStorage] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.known = [tensor.untyped_storage() for tensor in known]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


# Follows the memory of tensors as a device's allocator does: what is alive at once, beside what was there before.


DECOMPOSITIONS = ("linalg_svd", "linalg_eig", "linalg_qr", "linalg_chol", "linalg_lu", "svd", "geqrf")


class NoDecomposition(TorchDispatchMode):
    """A context in which every matrix decomposition raises, by whatever name it was called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").lstrip("_")
        if name.startswith(DECOMPOSITIONS):
            raise AssertionError(f"{func} was called where no decomposition is allowed")
        return func(*args, **(kwargs or {}))


# A device without float64 and without decompositions, as Apple's MPS. It computes on the CPU, under another name.


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
