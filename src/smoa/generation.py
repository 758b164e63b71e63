"""What `generate` does for adapted layers.

`generate` calls the model once for each token, and each call would form ΔW again. So its layers keep what they use
again (`smoa.kept`) from its start to its end, whether it returns or raises.

PEFT, TRL, lm-eval, pipelines and transformers' `model.load_adapter` all look up `generate` on the base model. So
injection wraps this method of the base model's class, once: a model without adapters finds no layer that keeps
anything. (An attribute of the object would hold its model: weakly, and `from_pretrained(adapter).generate(…)` loses it,
or strongly, and a deleted model keeps its memory.) A model that has a `generate` of its own on the object keeps it.

These layers keep nothing and compute as ever: quantized ones, whose dequantized blocks might be larger than the model,
unless `keep_in_generate(model, "blocks")` was called; sharded ones (FSDP, ZeRO-3), whose weights change their storage;
those that accelerate offloads; adapters in training mode with dropout; and all that are "off".
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, Literal, get_args

from torch import nn

from smoa.adapter_names import CALL, opened
from smoa.distributed import why_not_plain
from smoa.errors import ConfigError, UnsupportedModuleError
from smoa.kept import Snapshot, snapshot_of
from smoa.layer import smoa_layers
from smoa.merged import merged

Kept = Literal["blocks", "merged", "off"]


def keeping(model: nn.Module) -> AbstractContextManager[Snapshot]:
    """What is open while `model.generate` runs: its adapted layers keep what they use again."""
    return snapshot_of(
        layer
        for layer in smoa_layers(model).values()
        if layer.generation_cache == "blocks" and why_not_plain(layer) in (None, "quantized")
    )


def computing_merged(model: nn.Module) -> AbstractContextManager[object]:
    """What is open while `model.generate` runs: with "merged" its active adapters are merged, unless a batch names its
    adapters, or they are disabled or merged already."""
    layers = smoa_layers(model).values()
    if not any(layer.generation_cache == "merged" for layer in layers) or CALL.get() is not None:
        return nullcontext()
    idle = any(layer.disable_adapters or layer.merged for layer in layers)
    return nullcontext() if idle else merged(model)


def watch_generate(model: nn.Module) -> None:
    """Let the `generate` of the model's class, if it has one, keep what adapted layers use again."""
    kind: Any = type(model)
    generate = getattr(kind, "generate", None)
    if not callable(generate) or hasattr(generate, "smoa_watched"):
        return

    @wraps(generate)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()  # of a model in training mode: generating takes no gradients
        with (
            nullcontext() if call is None else opened(replace(call, trains=False)),
            computing_merged(self),
            keeping(self),
        ):
            return generate(self, *args, **kwargs)

    watched.smoa_watched = True  # type: ignore[attr-defined]
    watched.__module__, watched.__qualname__ = kind.__module__, f"{kind.__qualname__}.generate"  # where pickle finds it
    kind.generate = watched


def keep_in_generate(model: nn.Module, kept: Kept) -> None:
    """Set what the model's adapted layers keep while `generate` runs. Layers that are adapted later keep the default.

    Args:
        model: A model with SMoA adapters.
        kept: "blocks" keeps the diagonal blocks of ΔW: 1/K of the memory of the adapted weights, dequantized. "merged"
            merges the active adapters meanwhile, as `smoa.merged` does, and gives every bit back: tokens are computed
            with the very weights that training multiplies with. It is for one thread at a time, and takes no dropout.
            "off" keeps nothing: every token forms ΔW again. The default is "off" for quantized layers, else "blocks".
            Values that change while `generate` runs count from the next call on.

    Raises:
        ConfigError: `kept` is none of these, or the model has no SMoA adapter.
        UnsupportedModuleError: "merged", and a layer is quantized, sharded or offloaded.
    """
    if kept not in get_args(Kept):
        raise ConfigError(f"keep_in_generate: {kept!r} must be one of {', '.join(map(repr, get_args(Kept)))}")
    layers = smoa_layers(model)
    if not layers:
        raise ConfigError("keep_in_generate: the model has no SMoA adapter; add one first")
    for name, layer in layers.items():
        if kept == "merged" and (why := why_not_plain(layer)):
            raise UnsupportedModuleError(
                f'keep_in_generate: {name}: its weight is {why}, and "merged" gives back plain weights only; choose '
                '"blocks"'
            )
    for layer in layers.values():
        layer.generation_cache = kept
