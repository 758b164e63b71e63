"""Turns a framework's own LoRA settings, and a block of SMoA's, into a SmoaConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from smoa import ConfigError, SmoaConfig

RENAMED = {"lora_alpha": "alpha", "lora_dropout": "smoa_dropout"}
BIASES = {"lora_only": "smoa_only"}
SETTABLE = {field.name for field in fields(SmoaConfig)}
SHARED = SETTABLE & {field.name for field in fields(LoraConfig)} - {"peft_type", "peft_version", "auto_mapping"}
"""What means the same in both methods."""
NO_SETTINGS = {"peft_type", "peft_version", "auto_mapping", "runtime_config", "megatron_core"}


def smoa_config(lora: LoraConfig, settings: Mapping[str, Any], place: str) -> SmoaConfig:
    """The SmoaConfig of a framework's LoraConfig; `settings`, of the block at `place`, win and add what LoRA lacks."""
    check_settings(settings, place)
    given = {name: getattr(lora, name) for name in [*SHARED, *RENAMED] if getattr(lora, name) is not None}
    known = {**_in_our_names(given), "bias": BIASES.get(lora.bias, lora.bias), **_in_our_names(settings)}
    plain, foreign = LoraConfig(), {field.name for field in fields(LoraConfig)} - SHARED - RENAMED.keys() - NO_SETTINGS
    # those that were changed, where an empty list or mapping counts as unset
    refuse((name for name in foreign if (getattr(lora, name) or None) != (getattr(plain, name) or None)), place)
    return SmoaConfig(**known)


def check_settings(settings: Mapping[str, Any], place: str) -> None:
    """Find what is wrong with a block of SMoA settings by itself, before a model is loaded."""
    unknown = sorted(settings.keys() - SETTABLE - RENAMED.keys())
    if unknown:
        raise ConfigError(f"{place}: {', '.join(unknown)}: SmoaConfig has no such setting; remove or rename it")
    try:
        SmoaConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _in_our_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def refuse(names: Iterable[str], place: str) -> None:
    """Refuse settings of LoRA that would have no effect."""
    unknown = sorted(names)
    if unknown:
        raise ConfigError(f"{place}: {', '.join(unknown)}: a setting of LoRA that SMoA does not have; remove it")
