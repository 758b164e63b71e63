"""Which adapter each row of a call has, and where the layers that the call reaches find it.

A call belongs to the thread that makes it, and its layers find it by the thread. Nothing of the model changes for it,
so calls in other threads, with other names or none, don't meet. What a checkpoint computes again takes its call along:
it may run in another thread, or after another call.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import get_ident
from typing import Any

import torch
from torch import nn

from smoa.layers.rows import RowsBySlot

BASE = "__base__"
OPEN: dict[int, Call | None] = {}
"""The call that each thread makes, if that names adapters."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model that names an adapter, or the base, for each sample.

    Args:
        names: The adapter of each sample.
        modules: Those that take the names.
        once: Those that are given each sample once, however often `generate` repeats it.
        copies: Rows for each sample elsewhere: one for each beam, or each sequence to return.
        trains: Whether gradients are taken, and route and dropout must be the same when a checkpoint computes again.
        is_bound: Whether it is computed in a checkpoint that takes the names along.
    """

    names: tuple[str, ...]
    modules: frozenset[nn.Module] = frozenset()
    once: frozenset[nn.Module] = frozenset()
    copies: int = 1
    trains: bool = False
    is_bound: bool = False
    _rows: dict[int, RowsBySlot] = field(default_factory=dict)

    @cached_property
    def of_slot(self) -> tuple[str, ...]:
        """The adapter of each slot."""
        return tuple(name for name in dict.fromkeys(self.names) if name != BASE)

    def copies_in(self, module: nn.Module) -> int:
        """How many rows of each sample a module is given."""
        return 1 if module in self.once else self.copies

    def rows(self, module: nn.Module) -> RowsBySlot:
        """The slot of each row that a module is given; all layers share it."""
        copies = self.copies_in(module)
        if copies not in self._rows:
            slot_of = {name: slot for slot, name in enumerate(self.of_slot)}
            self._rows[copies] = RowsBySlot([slot_of.get(name, -1) for name in self.names for _ in range(copies)])
        return self._rows[copies]

    def names_for(self, module: nn.Module, known: Container[str]) -> list[str]:
        """The adapter of each row that a module is given, the base's for those that it does not know."""
        return [name if name in known else BASE for name in self.names for _ in range(self.copies_in(module))]

    def check_gradients(self, factors: dict[str, list[nn.Module]]) -> None:
        """Raise ValueError if a layer's adapters, given their factors, would get no gradients, or another's."""
        if not (torch.is_grad_enabled() or self.is_bound):
            raise ValueError(
                "adapter_names: a layer is called without gradients in a training step, as by a reentrant checkpoint "
                "that would compute again without the names; call model.gradient_checkpointing_enable()"
            )
        for name, own in factors.items():
            if not all(parameter.requires_grad for factor in own for parameter in factor.parameters()):
                raise ValueError(
                    f"adapter_names: {name!r} is frozen, as after set_adapter or disable_adapter; call "
                    "model.set_requires_grad(names) for all adapters that you train"
                )


@contextmanager
def opened(call: Call | None) -> Iterator[None]:
    """Make the calls of this thread, while the context is open, a part of this one; None: of none."""
    thread = get_ident()
    before = OPEN.get(thread)
    OPEN[thread] = call
    try:
        yield
    finally:
        OPEN.pop(thread, None)  # a call within this one may have left none
        if before is not None:
            OPEN[thread] = before


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model looks it up anew in each call
def call_of(module: nn.Module) -> Call | None:
    """The call that this thread makes, if it reaches the module."""
    call = OPEN.get(get_ident())
    return call if call is not None and module in call.modules else None


def take_names_along(model: nn.Module) -> None:
    """Let what transformers checkpoints in a model be computed again for the call that it was computed for.

    The function that modules call to checkpoint is replaced once; for calls without names it does what it did.
    """
    for module in model.modules():
        own = module.__dict__.get("_gradient_checkpointing_func")
        if own is not None and getattr(own, "func", None) is not _checkpointed:
            module.__dict__["_gradient_checkpointing_func"] = partial(_checkpointed, own)


def _checkpointed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = OPEN.get(get_ident())
    bound = None if call is None else replace(call, is_bound=True)  # None: not for a call that goes on meanwhile

    def computed(*args: Any, **kwargs: Any) -> Any:
        with opened(bound):
            return function(*args, **kwargs)

    return checkpoint(computed, *args, **kwargs)
