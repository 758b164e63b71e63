"""Calls that give each sample of a batch its adapter: which layers take the names, and what is refused.

`adapter_names=[…]` gives each sample its adapter, as in PEFT's LoRA, and in training each adapter the gradient of its
own samples (`smoa.layers.calls`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from textwrap import shorten
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.errors import nearest
from smoa.layers.calls import BASE, OPEN, Call, call_of, opened, take_names_along
from smoa.layers.layer import SmoaLayer

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
    is_disabled = any(isinstance(module, SmoaLayer) and module.disable_adapters for module in modules)
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


def _taking_names(module: nn.Module) -> Iterator[Any]:
    """The layers that take the names; their adapters are not looked at, which may be many."""
    if isinstance(module, (SmoaLayer, AuxiliaryTrainingWrapper)):
        yield module
    if isinstance(module, SmoaLayer):
        yield from _taking_names(module.base_layer)  # trained tokens of a head that is tied
    elif not isinstance(module, AuxiliaryTrainingWrapper):
        for child in module.children():
            yield from _taking_names(child)


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
