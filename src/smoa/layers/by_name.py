"""Calls that name an adapter for each sample of a batch: which layers take the names, and what is refused.

`adapter_names=[…]` gives each sample its adapter, as in PEFT's LoRA, and in training each adapter the gradient of its
own samples. A call belongs to the thread that makes it, and its layers find it by the thread. Nothing of the model
changes for it, so calls in other threads, with other names or none, don't meet. What a checkpoint computes again takes
its call along: it may run in another thread, or after another call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from textwrap import shorten
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.errors import nearest
from smoa.layers.batch import RowsBySlot

BASE = "__base__"
OPEN: dict[int, Call | None] = {}
"""The call that each thread makes, if that names adapters."""
SEQUENCE_FIRST = ("fsmt", "led", "longformer", "xlnet")
"""Types of models that give layers inputs whose first dimension is the tokens."""
TOWER = re.compile(r"pixtral|.*_vision(_encoder)?|.*_audio_encoder")
"""Types of parts of models that give layers the patches of all images, or the frames of all sounds, in one sequence."""
ROUTED = re.compile(r"(^|\.)experts?\.\d+(\.|$)")
"""The paths of layers within an expert that is a module."""
DISTANCES = re.compile(r"(relative_attention_bias|rel_attn_embed|distance_embedding)$")
"""The paths of embeddings of how far tokens are apart, which are one for all samples."""
_TRAINS: WeakKeyDictionary[BaseTuner, RLock] = WeakKeyDictionary()
"""Held by the thread of the training forward by names that a model is in."""


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


def call_by_names(tuner: BaseTuner, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Remove `adapter_names` from `kwargs`, and give them to the model's layers in the calls of this thread while the
    context is open. In training each adapter gets the gradient of its own samples.

    Raises:
        ValueError: a name is neither an adapter nor "__base__"; a layer is given rows of which it can't be told whose
            they are; or another thread trains the model by names.
    """
    names = kwargs.pop("adapter_names", None)
    if names is None:  # within another call of this thread this one takes the active adapters
        return opened(None) if OPEN else nullcontext()
    names = names if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names={names!r}: give a list that names an adapter or '{BASE}' for each sample")
    known = {BASE, *tuner.peft_config}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"adapter_names: unknown adapters {shorten(str(unknown), 500)}{nearest(unknown[0], known)}")
    modules = list(_taking_names(tuner))
    is_disabled = any(_is_adapted(module) and module.disable_adapters for module in modules)
    for module in modules:
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = module._adapters.intersection(names)
            if own and not is_disabled and (module.disable_adapters or set(module.active_adapters) - module._adapters):
                raise ValueError(
                    f"adapter_names: the active adapter has no {type(module).__name__}, so PEFT would leave out those "
                    f"of {sorted(own)}; make one of these active with model.set_adapter"
                )
            if _names_of_call not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_names_of_call, with_kwargs=True)
        elif module.rows_unknown is not None and not module.adapters.keys().isdisjoint(names):
            raise ValueError(f"adapter_names can't be used: {module.rows_unknown}; use one adapter for the whole batch")
    get_encoder: Any = getattr(tuner.model, "get_encoder", None)
    encoder = get_encoder() if get_encoder else None
    once = frozenset() if encoder in (None, tuner.model) else frozenset(encoder.modules())  # samples as they are
    beams = kwargs.get("num_beams") or 1  # for a model with a `generate` of its own
    trains = torch.is_grad_enabled() and tuner.training  # a layer that is new in a model in evaluation is in training
    if torch.is_grad_enabled():
        take_names_along(tuner.model)
    call = Call(tuple(names), frozenset(modules), once, beams, trains)
    return _trained_by_one_thread(tuner, call) if trains else opened(call)


@contextmanager
def _trained_by_one_thread(tuner: BaseTuner, call: Call) -> Iterator[None]:
    lock = _TRAINS.setdefault(tuner, RLock())
    if not lock.acquire(blocking=False):
        raise ValueError("adapter_names: another thread trains this model by names; train in one thread at a time")
    try:
        with opened(call):
            yield
    finally:
        lock.release()


def _taking_names(module: Any) -> Iterator[Any]:
    """The layers that take the names; their adapters are not looked at, which may be many."""
    if _is_adapted(module) or isinstance(module, AuxiliaryTrainingWrapper):
        yield module
    if _is_adapted(module):
        yield from _taking_names(module.base_layer)  # trained tokens of a head that is tied
    elif not isinstance(module, AuxiliaryTrainingWrapper):
        for child in module.children():
            yield from _taking_names(child)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(type(module), "rows_unknown")  # a `SmoaLayer`, which imports this file


def _names_of_call(wrapper: Any, args: Any, kwargs: Any = None) -> Any:
    """A hook that gives a wrapper of PEFT's the names in each call that has some. It stays: one that came and went with
    a call would be seen by other threads."""
    # without kwargs, another thread has just begun to register the hook, and this one's call has no names
    call = None if kwargs is None or not OPEN else call_of(wrapper)
    return None if call is None else (args, {**kwargs, "adapter_names": call.names_for(wrapper, wrapper._adapters)})


def rows_unknown(model: nn.Module, path: str) -> str | None:
    """Why a layer of a model is given rows of which it can't be told of which sample they are; None if they are one
    row, or several, for each sample."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in SEQUENCE_FIRST:
        return f"{kind} gives its layers tokens first, not samples"
    if ROUTED.search(path):
        return f"{path} is an expert, which is given tokens of many samples"
    if DISTANCES.search(path):
        return f"{path} is given the distances of tokens, not samples"
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if isinstance(kind := getattr(config, "model_type", None), str):
            return f"{path} is given the patches of all images at once" if TOWER.fullmatch(kind) else None
    return None
