"""Generation, and an adapter for each sample of a batch.

`generate` calls the model once for each token, and each call would form ΔW again. So its layers' caches
(`smoa.layers.weight_cache`) are open from its start to its end, whether it returns or raises.

PEFT, TRL, lm-eval, pipelines and transformers' `model.load_adapter` all look up `generate` on the base model. So
injection wraps this method of the base model's class, once: a model without adapters finds no layer whose cache to
open. (An attribute of the object would hold its model: weakly, and `from_pretrained(adapter).generate(…)` loses it, or
strongly, and a deleted model keeps its memory.) A model that has a `generate` of its own on the object keeps it.

These layers keep nothing and compute as ever: quantized ones, whose dequantized blocks might be larger than the model,
unless `keep_in_generate(model, "blocks")` was called; sharded ones (FSDP, ZeRO-3), whose refilled storage a cache can't
notice; those that accelerate offloads; adapters in training mode with dropout; and all that are "off".

`adapter_names=[…]` gives each sample of a batch its adapter, as in PEFT's LoRA. `generate` repeats samples, for each
beam or sequence to return, so the names are repeated too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from textwrap import shorten
from typing import Any, Literal, get_args

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.errors import ConfigError, nearest
from smoa.layers.layer import SmoaLayer, smoa_layers
from smoa.layers.weight_cache import open_caches, why_not_plain

Kept = Literal["blocks", "off"]
BASE = "__base__"
COPIES: ContextVar[int] = ContextVar("smoa_copies", default=1)
"""Rows for each sample in the `generate` that runs: one for each beam, or each sequence to return."""


def caches_of_generate(model: nn.Module) -> AbstractContextManager[None]:
    """The caches that are open while `model.generate` runs."""
    return open_caches(_keeping(model))


def _keeping(model: nn.Module) -> list[SmoaLayer]:
    return [
        layer
        for layer in smoa_layers(model).values()
        if layer.generation_cache == "blocks" and why_not_plain(layer) in (None, "quantized")
    ]


def watch_generate(model: nn.Module) -> None:
    """Let the `generate` of the model's class, if it has one, open caches of adapted layers and repeat a mixed batch's
    names."""
    kind: Any = type(model)
    generate = getattr(kind, "generate", None)
    if not callable(generate) or hasattr(generate, "smoa_watched"):
        return

    @wraps(generate)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with caches_of_generate(self), samples_repeated(self, args, kwargs):
            return generate(self, *args, **kwargs)

    watched.smoa_watched = True  # type: ignore[attr-defined]
    watched.__module__, watched.__qualname__ = kind.__module__, f"{kind.__qualname__}.generate"  # where pickle finds it
    kind.generate = watched


def keep_in_generate(model: nn.Module, kept: Kept) -> None:
    """Set what the model's adapted layers keep while `generate` runs. Layers that are adapted later keep the default.

    Args:
        model: A model with SMoA adapters.
        kept: "blocks" keeps the diagonal blocks of ΔW: 1/K of the memory of the adapted weights, dequantized. "off"
            keeps nothing: every token forms ΔW again. The default is "off" for quantized layers, else "blocks". Writes
            through `tensor.data` while `generate` runs are not seen.

    Raises:
        ConfigError: `kept` is none of these, or the model has no SMoA adapter.
    """
    if kept not in get_args(Kept):
        raise ConfigError(f"keep_in_generate: {kept!r} must be one of {', '.join(map(repr, get_args(Kept)))}")
    layers = smoa_layers(model)
    if not layers:
        raise ConfigError("keep_in_generate: the model has no SMoA adapter; add one first")
    for layer in layers.values():
        layer.generation_cache = kept


@contextmanager
def adapter_names_hooks(tuner: BaseTuner, kwargs: dict[str, Any]) -> Iterator[None]:
    """Remove `adapter_names` from `kwargs`, and pass it to every adapted layer while the context is open.

    Raises:
        ValueError: the model is in training mode, or a name is neither an adapter nor "__base__".
    """
    adapter_names = kwargs.pop("adapter_names", None)
    if adapter_names is None:
        yield
        return
    if tuner.training:  # the first sentence is PEFT's
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. Call model.eval(); to train several "
            "adapters at once, use smoa.AdapterPool"
        )
    known = {BASE, *tuner.peft_config}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names: unknown adapters {shorten(str(unknown), 500)}{nearest(unknown[0], known)}")
    beams = kwargs.get("num_beams") or 1  # for a model with a `generate` of its own
    get_encoder: Any = getattr(tuner.model, "get_encoder", None)
    encoder = get_encoder() if get_encoder else None
    once = set() if encoder in (None, tuner.model) else set(encoder.modules())  # `generate` repeats no sample there
    repeated: dict[int, list[str]] = {}

    def with_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        copies = 1 if module in once else max(beams, COPIES.get())
        if copies not in repeated:
            repeated[copies] = [name for name in adapter_names for _ in range(copies)]
        return args, {**kwargs, "adapter_names": repeated[copies]}

    layers = list(_taking_names(tuner))
    handles = [layer.register_forward_pre_hook(with_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _taking_names(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that take the names; their adapters are not looked at, which may be many."""
    if isinstance(module, (SmoaLayer, AuxiliaryTrainingWrapper)):
        yield module
    if isinstance(module, SmoaLayer):
        yield from _taking_names(module.base_layer)  # trained tokens of a head that is tied
    elif not isinstance(module, AuxiliaryTrainingWrapper):
        for child in module.children():
            yield from _taking_names(child)


@contextmanager
def samples_repeated(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Repeat the names as `model.generate(*args, **kwargs)` repeats samples, by its settings or the model's own."""
    configs = (kwargs.get("generation_config", *args[1:2]), getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if isinstance(value, int)), 1)

    token = COPIES.set(max(setting("num_beams"), setting("num_return_sequences")))
    try:
        yield
    finally:
        COPIES.reset(token)
