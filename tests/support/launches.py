"""Counts the operations that a device would start: those that move or compute data, views and allocations aside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from smoa import partition

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
