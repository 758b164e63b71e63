"""Calls that name an adapter for each sample of a batch.

`adapter_names=[…]` gives each sample its adapter, as in PEFT's LoRA, and in training each adapter the gradient of its
own samples. The layers of a model look for the call that they are in. What a checkpoint computes again takes its call
along: it may run in another thread, or after another call.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.kernels.plan import RowsBySlot

BASE = "__base__"
CALL: ContextVar[Call | None] = ContextVar("smoa_call", default=None)
"""The call that names adapters, while a model computes it."""
OPEN: list[None] = []
"""As many entries as such calls are open in all threads: a compiler can't look into a `ContextVar`, but into this."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model that names an adapter, or the base, for each sample.

    Args:
        names: The adapter of each sample.
        copies: Rows that layers may be given for each sample, if not one: for each beam, or sequence to return.
        trains: Whether gradients are taken, and the route must be the same when a checkpoint computes again.
        is_computed_again: Whether this is a part of the model under a checkpoint that takes its call along.
    """

    names: tuple[str, ...]
    copies: int = 1
    trains: bool = False
    is_computed_again: bool = False
    _rows: dict[int, RowsBySlot] = field(default_factory=dict)

    @cached_property
    def of_slot(self) -> tuple[str, ...]:
        """The adapter of each slot."""
        return tuple(name for name in dict.fromkeys(self.names) if name != BASE)

    def names_of(self, count: int, known: Container[str]) -> list[str]:
        """The adapter of each of so many rows, the base for those that aren't known."""
        copies = self.copies if count == len(self.names) * self.copies else 1
        if count != len(self.names) * copies:
            raise ValueError(  # PEFT's words, as below
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {count} respectively."
            )
        return [name if name in known else BASE for name in self.names for _ in range(copies)]

    def rows(self, count: int) -> RowsBySlot:
        """The slot of each of so many rows; all layers share it."""
        if count not in self._rows:
            slot_of = {name: slot for slot, name in enumerate(self.of_slot)}
            self._rows[count] = RowsBySlot([slot_of.get(name, -1) for name in self.names_of(count, slot_of)])
        return self._rows[count]


@contextmanager
def opened(call: Call | None) -> Iterator[None]:
    """Make what is computed while the context is open a part of this call; None: of none."""
    token = CALL.set(call)
    OPEN.append(None)
    try:
        yield
    finally:
        OPEN.pop()
        CALL.reset(token)


def call_by_names(
    tuner: BaseTuner, wrappers: Iterable[AuxiliaryTrainingWrapper], kwargs: dict[str, Any]
) -> AbstractContextManager[None]:
    """Remove `adapter_names` from `kwargs`, and give them to the model's layers, and PEFT's wrappers, while the context
    is open."""
    names = kwargs.pop("adapter_names", None)
    if names is None:  # within another call this one takes the active adapters
        return opened(None) if OPEN else nullcontext()
    names = tuple(names)
    if unknown := sorted({*names} - {BASE, *tuner.peft_config}, key=str):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(map(str, unknown))}")
    for wrapper in wrappers:
        if _name_rows not in wrapper._forward_pre_hooks.values():
            wrapper.register_forward_pre_hook(_name_rows, with_kwargs=True)
    configs = kwargs.get("generation_config"), getattr(tuner.model, "generation_config", None)
    sources = [kwargs, *(vars(config) for config in configs if config)]
    copies = (next((own[key] for own in sources if own.get(key)), 1) for key in ("num_beams", "num_return_sequences"))
    if torch.is_grad_enabled():
        take_names_along(tuner.model)
    return opened(Call(names, max(copies), torch.is_grad_enabled() and tuner.training))


def _name_rows(wrapper: Any, args: Any, kwargs: Any) -> Any:
    """A hook that gives a wrapper of PEFT's the names in each call that has some."""
    if not OPEN or (call := CALL.get()) is None:
        return None
    return args, {**kwargs, "adapter_names": call.names_of(len(args[0]), wrapper._adapters)}


def take_names_along(model: nn.Module) -> None:
    """Let what transformers checkpoints in a model be computed again for the call that it was computed for.

    The function that modules call to checkpoint is replaced once; for calls without names it does what it did.
    """
    for module in model.modules():
        own = module.__dict__.get("_gradient_checkpointing_func")
        if own is not None and getattr(own, "func", None) is not _checkpointed:
            module.__dict__["_gradient_checkpointing_func"] = partial(_checkpointed, own)


def _checkpointed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = CALL.get()
    call = call and replace(call, is_computed_again=True)

    def computed(*args: Any, **kwargs: Any) -> Any:
        with opened(call):
            return function(*args, **kwargs)

    return checkpoint(computed, *args, **kwargs)
