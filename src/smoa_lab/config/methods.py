"""The table of methods that a run config can name: SMoA and the PEFT methods it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, GraloraConfig, HiraConfig, LoHaConfig, LoraConfig, PeftConfig

from smoa import SmoaConfig


@dataclass(frozen=True)
class Method:
    """``config_class`` is the PEFT config, ``preset`` the settings that the method's name decides.

    ``full`` has no config: all weights are trained.
    """

    config_class: type[PeftConfig] | None
    preset: dict[str, Any] = field(default_factory=dict)

    def peft_config(self, adapter: dict[str, Any]) -> PeftConfig | None:
        """The PEFT config of a run: the ``adapter:`` block on top of the preset, for a causal language model."""
        if self.config_class is None:
            return None
        return self.config_class(**{"task_type": "CAUSAL_LM", **adapter, **self.preset})


METHODS: dict[str, Method] = {
    "smoa": Method(SmoaConfig),
    "melora": Method(SmoaConfig, {"partition": "contiguous", "modulation": "none"}),
    "lora": Method(LoraConfig),
    "rslora": Method(LoraConfig, {"use_rslora": True}),
    "dora": Method(LoraConfig, {"use_dora": True}),
    "pissa": Method(LoraConfig, {"init_lora_weights": "pissa"}),
    "hira": Method(HiraConfig),
    "gralora": Method(GraloraConfig),
    "loha": Method(LoHaConfig),
    "adalora": Method(AdaLoraConfig),
    "full": Method(None),
}
