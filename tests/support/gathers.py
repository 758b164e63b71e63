"""Finds operations that gather or scatter entries by index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.profiler import ProfilerActivity, profile

from smoa.maths import blocks

BY_INDEX = (
    "aten::index",
    "aten::_index",
    "aten::gather",
    "aten::scatter",
    "aten::take",
    "aten::masked",
    "aten::embedding",
)


@contextmanager
def gathers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lists every such operation of the context when it closes, those inside custom operators and of NumPy included."""
    found: list[str] = []
    original = blocks.numpy.take

    def take(*args: object, **kwargs: object) -> object:
        found.append("numpy.take")
        return original(*args, **kwargs)  # type: ignore[call-overload]

    with monkeypatch.context() as patched, profile(activities=[ProfilerActivity.CPU]) as profiled:
        patched.setattr(blocks.numpy, "take", take)
        yield found
    found.extend(event.name for event in profiled.events() if event.name.startswith(BY_INDEX))
