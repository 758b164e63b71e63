"""`adapter_names=[…]`: an adapter for each sample of a batch, as in PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from smoa.layers.layer import SmoaLayer

BASE = "__base__"
_COPIES: ContextVar[int] = ContextVar("smoa_copies", default=1)
"""Rows for each sample in the `generate` that runs: one for each beam, or each sequence to return."""


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
    _check_names(tuner, adapter_names)
    beams = kwargs.get("num_beams") or 1  # for a model with a `generate` of its own
    encoder = _encoder(tuner.model)
    encoder_modules = set() if encoder is None else set(encoder.modules())
    handles = []
    for module in tuner.modules():
        if isinstance(module, (SmoaLayer, AuxiliaryTrainingWrapper)):
            # `generate` repeats every sample, except in the encoder
            hook = _inject(adapter_names, None if module in encoder_modules else beams)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def samples_repeated(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Repeat the names as `model.generate(*args, **kwargs)` repeats samples, by its settings or the model's own."""
    configs = (kwargs.get("generation_config", *args[1:2]), getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if isinstance(value, int)), 1)

    token = _COPIES.set(max(setting("num_beams"), setting("num_return_sequences")))
    try:
        yield
    finally:
        _COPIES.reset(token)


def _inject(adapter_names: list[str], beams: int | None) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        copies = 1 if beams is None else max(beams, _COPIES.get())
        return args, {**kwargs, "adapter_names": [name for name in adapter_names for _ in range(copies)]}

    return hook


def _check_names(tuner: BaseTuner, adapter_names: list[str]) -> None:
    if tuner.training:
        raise ValueError("adapter_names can't be used in training mode; call model.eval() first")
    known = {BASE} | {name for module in tuner.modules() if isinstance(module, SmoaLayer) for name in module.smoa_A}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names: unknown adapters {unknown}; use some of {sorted(known)}")


def _encoder(model: nn.Module) -> nn.Module | None:
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder: nn.Module | None = get_encoder() if get_encoder else None
    return None if encoder is model else encoder
