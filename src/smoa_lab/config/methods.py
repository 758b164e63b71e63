"""The table of methods that a run config can name: SMoA and the PEFT methods it is compared with."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import PeftConfig
from peft.tuners.lora.config import CordaConfig

from smoa.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """``config`` is ``module:class`` of a PEFT config, ``preset`` the settings that the method's name decides.

    ``full`` has no config: all weights are trained. ``then`` is ``module:function`` of what PEFT does to the trained
    adapter. ``loads`` is false if PEFT cannot load the saved adapter into the base model.
    """

    config: str | None
    preset: dict[str, Any] = field(default_factory=dict)
    then: str | None = None
    loads: bool = True

    @property
    def config_class(self) -> type[PeftConfig] | None:
        """The PEFT config class.

        Raises:
            ConfigError: the installed PEFT is too old to have it.
        """
        if self.config is None:
            return None
        _ = self.after
        found: type[PeftConfig] = _installed(self.config)
        return found

    @property
    def after(self) -> Callable[..., None] | None:
        """What changes the trained model; raises ConfigError if the installed PEFT is too old to have it."""
        return None if self.then is None else _installed(self.then)

    def peft_config(self, adapter: dict[str, Any]) -> PeftConfig | None:
        """The PEFT config of a run: the ``adapter:`` block on top of the preset, for a causal language model."""
        chosen = self.config_class
        return None if chosen is None else chosen(**{"task_type": "CAUSAL_LM", **adapter, **self.preset})


def _installed(place: str) -> Any:
    module, name = place.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError(f"{name} is not in PEFT {peft.__version__}; run: pip install -U peft") from None


METHODS: dict[str, Method] = {
    "smoa": Method("smoa:SmoaConfig"),
    "melora": Method("smoa:SmoaConfig", {"partition": "contiguous", "modulation": "none"}),
    "lora": Method("peft:LoraConfig"),
    "rslora": Method("peft:LoraConfig", {"use_rslora": True}),
    "dora": Method("peft:LoraConfig", {"use_dora": True}),
    "pissa": Method("peft:LoraConfig", {"init_lora_weights": "pissa"}),
    "corda": Method(
        "peft:LoraConfig",
        {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
        loads=False,
    ),
    "lora-reduced": Method("peft:LoraConfig", then="peft.tuners.lora.intruders:reduce_intruder_dimension"),
    "hira": Method("peft:HiraConfig"),
    "gralora": Method("peft:GraloraConfig"),
    "loha": Method("peft:LoHaConfig"),
    "adalora": Method("peft:AdaLoraConfig"),
    "osf": Method("peft:OSFConfig"),
    "full": Method(None),
}
