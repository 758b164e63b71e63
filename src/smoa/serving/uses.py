"""Which batch a call of a pool's base has: that of the `use` around it that was opened last, and is still open.

A pool keeps its open batches in a context variable of its own, so threads, asyncio's tasks and other pools don't meet.
Two things go past a context variable, and are found on the call stack:

- A generator that is suspended inside `use` shares the variable with whoever asks it for its next step. What it has
  opened is for calls from inside it, and these may have nothing else.
- A checkpoint computes a part of the model again in the backward. A reentrant one is known by its node of the graph;
  the other kind by `Mark`.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager, contextmanager
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from threading import get_ident
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from smoa.errors import ConfigError
from smoa.serving.groups import AdapterGroup, LayerStack, LoadedAdapter, new_number
from smoa.serving.rows import RowsBySlot
from smoa.tuner.generation import COPIES

MANAGERS = {
    *(getattr(_GeneratorContextManager, name).__code__ for name in ("__enter__", "__exit__")),
    *(getattr(_AsyncGeneratorContextManager, name).__code__ for name in ("__aenter__", "__aexit__")),
}
"""What runs a generator that is a context manager: it is suspended while the body of its `with` runs."""
STREAMS = "give each stream a thread of its own, or open `use` around each step"


Diagonals = WeakKeyDictionary[LayerStack, tuple[Hashable, Sequence[Tensor]]]


class Batch:
    """The adapter of each row, None for the base, and what calls with these rows keep.

    Args:
        adapters: The adapters.
        diagonals: The diagonal blocks of W by layer, and the state that they came from; batches may share them.
    """

    is_open = False
    """Whether its `use` has begun and not ended."""
    trains = False
    """Whether gradients were on when it was opened."""
    streams: tuple[FrameType, ...] = ()
    """While it is open, the generators in which it was opened, the innermost first."""
    thread = 0
    """The thread that opened it."""
    is_of_stream = False
    """Whether there were any."""

    def __init__(self, adapters: Sequence[LoadedAdapter | None], diagonals: Diagonals | None = None) -> None:
        self.adapters = adapters
        self.groups = {id(adapter.group): adapter.group for adapter in adapters if adapter is not None}.values()
        self.diagonals = Diagonals() if diagonals is None else diagonals
        self.number = new_number()
        self._rows: dict[tuple[int, int, int], RowsBySlot] = {}

    def by_row(self, x: Tensor) -> Tensor:
        """x with its rows, to each of which belongs one adapter, as the first dimension."""
        return x

    def rows(self, group: AdapterGroup, count: int, path: str) -> RowsBySlot:
        """The slots in a group of the `count` rows that the layer at `path` is given."""
        key = id(group), count, COPIES.get()
        if key not in self._rows:
            own = (each if each is not None and each.group is group else None for each in self.adapters_of(count, path))
            self._rows[key] = RowsBySlot([-1 if each is None else each.slot for each in own], self.number)
        return self._rows[key]

    def adapters_of(self, count: int, path: str) -> Sequence[LoadedAdapter | None]:
        """The adapter of each row. Only `generate` says that it repeats samples, and how often."""
        if count == len(self.adapters):
            return self.adapters
        if count == len(self.adapters) * (copies := COPIES.get()):
            return [adapter for adapter in self.adapters for _ in range(copies)]
        raise ConfigError(
            f"AdapterPool.use: {len(self.adapters)} names, but {path} is given {count} rows; name an adapter for each "
            "sample of the batch, and none that adapts a layer whose rows are not samples"
        )

    def forget(self) -> None:
        """Drop the factors that are kept."""
        for rows in list(self._rows.values()):
            rows.kept.clear()


class Uses:
    """The open batches of one pool."""

    def __init__(self) -> None:
        self._stack: ContextVar[tuple[Batch, ...]] = ContextVar("smoa_pool_batches", default=())
        self.open: list[Batch] = []
        """Those of all threads, in the order in which they were opened."""

    @contextmanager
    def opened(self, batch: Batch) -> Iterator[None]:
        """Give the calls in this context the batch."""
        batch.streams, batch.trains, batch.is_open = tuple(_generators()), torch.is_grad_enabled(), True
        batch.is_of_stream, batch.thread = bool(batch.streams), get_ident()
        token = self._stack.set((*self._stack.get(), batch))
        self.open.append(batch)
        failed = True
        try:
            yield
            failed = False
        finally:
            stack = self._stack.get()
            in_order = stack[-1:] == (batch,)
            try:
                self._stack.reset(token)
            except ValueError:  # another context
                in_order = False
            self._stack.set(tuple(each for each in stack if each is not batch))
            self.open.remove(batch)
            batch.streams, batch.is_open = (), False
            if not (in_order or failed):
                raise ConfigError(
                    "AdapterPool.use: is left in another context than it was opened in, or before a `use` that was "
                    f"opened after it; {STREAMS}"
                )

    def of_call(self, path: str) -> Batch | None:
        """The batch of this call of the layer at ``path``; None outside every `use`."""
        stack = self._stack.get()
        if torch.compiler.is_compiling():
            return stack[-1] if stack else None
        while stack and stack[-1].is_of_stream and not stack[-1].is_open:  # it ended in another context
            stack = stack[:-1]
        found = stack[-1] if stack else None
        if torch._C._current_graph_task_id() != -1:
            found = self._recomputed(found, path)
        elif any(batch.streams for batch in tuple(self.open)) and not self._is_of_this_stream(found):
            raise ConfigError(
                f"AdapterPool: {path} is called beside a generator that is suspended inside `use`, or from one whose "
                f"`use` was opened in another context; {STREAMS}"
            )
        if found is not None and not found.is_open:
            raise ConfigError(
                f"AdapterPool: {path} is called after its `use` has ended; open one in each task and stream"
            )
        without_gradients = found is not None and found.trains and not torch.is_grad_enabled()
        if without_gradients and (node := _reentrant("forward")) is not None:
            node.smoa_batches = {**getattr(node, "smoa_batches", {}), self: found}
        return found

    def _is_of_this_stream(self, found: Batch | None) -> bool:
        """Whether the batch found is the right one for the code that is running.

        It is wrong in two cases: a generator around its `use` is suspended, so that the caller would compute with the
        generator's adapters; or a generator that is running has opened a `use` of its own, which the context lost. The
        first is not asked in a thread that was handed the context (`asyncio.to_thread`): its generator waits for it.
        """
        running = set(_generators())
        mine = () if found is None else found.streams
        handed_over = found is not None and found.thread != get_ident()
        return (handed_over or running.issuperset(mine)) and all(
            batch.streams[0] in mine for batch in tuple(self.open) if batch.streams and batch.streams[0] in running
        )

    def _recomputed(self, found: Batch | None, path: str) -> Batch | None:
        """The batch of a call in a backward, which may run in a thread of its own, where none is open."""
        if (node := _reentrant("backward")) is None:
            last = next((batch for batch in reversed(self.open) if batch.trains), None)
            return last if found is None else found
        made: Batch | None = getattr(node, "smoa_batches", {}).get(self)
        if found not in (None, made):
            raise ConfigError(
                f"AdapterPool: a checkpoint computes {path} again under another `use` than the first time; call "
                "backward inside the `use` of its forward"
            )
        return made


def _generators() -> list[FrameType]:
    """The generators that are running in this thread, the innermost first, without those that are context managers."""
    found, frame = [], sys._getframe(1)
    while (outer := frame.f_back) is not None:
        if frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR) and outer.f_code not in MANAGERS:
            found.append(frame)
        frame = outer
    return found


def _reentrant(method: str) -> Any:
    """The node of the reentrant checkpoint whose ``forward`` or ``backward`` is running; None if there is none."""
    code, frame = getattr(CheckpointFunction, method).__code__, sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code is code:
            return frame.f_locals["ctx"]
    return None
