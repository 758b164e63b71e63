"""The methods that a run can name: every one that the installed PEFT has, SMoA among them, and presets of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import shorten
from typing import Annotated, Any

import peft
from peft import PeftConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import StringConstraints

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa.errors import ConfigError, nearest

MethodName = Annotated[str, StringConstraints(to_lower=True)]


@dataclass(frozen=True)
class Method:
    """``peft_type`` is PEFT's name of the method in lower case, ``preset`` the settings that the method's name decides.

    ``full`` has no such name: all weights are trained.
    """

    peft_type: str | None
    preset: dict[str, Any] = field(default_factory=dict)

    @property
    def config_class(self) -> type[PeftConfig] | None:
        return None if self.peft_type is None else _config_classes()[self.peft_type]

    @property
    def budget_key(self) -> str | None:
        """The key of the adapter that sets how many parameters it has; None if there is none."""
        if self.peft_type in BUDGET_KEYS:
            return BUDGET_KEYS[self.peft_type]
        return "r" if hasattr(self.config_class, "r") else None

    def peft_config(self, adapter: dict[str, Any]) -> PeftConfig | None:
        """The PEFT config of a run: the ``adapter:`` block on top of the preset, for a causal language model; raises
        ConfigError if PEFT refuses the block."""
        chosen = self.config_class
        try:
            return None if chosen is None else chosen(**{"task_type": "CAUSAL_LM", **adapter, **self.preset})
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ConfigError(shorten(str(error), 1000)) from error


PRESETS: dict[str, Method] = {
    "melora": Method("smoa", {"partition": "contiguous", "modulation": "none"}),
    "rslora": Method("lora", {"use_rslora": True}),
    "dora": Method("lora", {"use_dora": True}),
    "pissa": Method("lora", {"init_lora_weights": "pissa"}),
    "full": Method(None),
}
BUDGET_KEYS: dict[str, str | None] = {
    "adalora": "init_r",
    "boft": "boft_block_size",
    "c3a": "block_size",
    "fourierft": "n_frequency",
    "oft": "oft_block_size",
    "osf": "effective_rank",
    "supertuning": None,
    "tinylora": "u",
    "unilora": "theta_d_length",
    "waveft": "n_frequency",
}
"""Where it is another key than ``r``, or none that is a whole number."""
OTHER_LAYERS = ("adaption_prompt", "ln_tuning", "trainable_tokens")
"""Methods whose ``target_modules`` are attention modules, norms or embeddings, and not linear layers."""
REFUSED = {
    "poly": "chooses among its parameters by task ids, which rows here don't have",
    "shadow": "trains a second model beside the base, with a loss of its own",
    "xlora": "mixes adapters that were trained before",
}
"""Methods of PEFT that no run can train, and why."""
MOVED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""``init_lora_weights`` with which a part of the base's weights goes into the adapter (PEFT's tuners/lora/layer.py)."""
PROMPTS = "trains virtual tokens before the text: losses here are read at the text's own places, and it can't be merged"


def find_method(name: str) -> Method:
    """The method of this name, a preset's or PEFT's own in any case: ``lora``, ``SHiRA``, ``dora``. Raises ConfigError
    if the installed PEFT has none, or it can't be trained here."""
    key = name.lower()
    if key in PRESETS:
        return PRESETS[key]
    found = _config_classes().get(key)
    if found is None:
        names = method_names()
        near = nearest(name, names).partition("; choose")[0]
        raise ConfigError(
            f"method: there is no method {name!r}{near or ';'} PEFT {peft.__version__} and smoa have "
            f"{', '.join(names)}; a newer PEFT may have more"
        )
    if (reason := _refusal(key, found)) is not None:
        raise ConfigError(f"method: {key} {reason}; choose another method")
    return Method(key)


def moves_base(config: PeftConfig | None) -> bool:
    """Whether the adapter takes a part of the base's weights: switching it off doesn't give the base."""
    return str(getattr(config, "init_lora_weights", None)).lower().startswith(MOVED)


def base_lost(config: PeftConfig | None) -> str | None:
    """Why a trained adapter that is switched off doesn't leave the untouched base; None where it does."""
    if moves_base(config):
        return "moves weights of the base into the adapter"
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"with bias: {bias} trains biases of the base, which stay when the adapter is switched off"
    return None


def dpo_refusal(config: PeftConfig | None) -> str | None:
    """Why a method can't be trained on preferences; None if it can."""
    if (reason := base_lost(config)) is not None:
        return f"{reason}, so that there is no reference for DPO"
    if getattr(config, "is_adaption_prompt", False):
        return "calls the model past the losses that TRL's DPO puts into it"
    return None


def method_names() -> list[str]:
    """All methods that a run can name."""
    trained = (name for name, found in _config_classes().items() if _refusal(name, found) is None)
    return sorted({*PRESETS, *trained})


def _config_classes() -> dict[str, type[PeftConfig]]:
    return {kind.value.lower(): found for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _refusal(name: str, found: type[PeftConfig]) -> str | None:
    return PROMPTS if issubclass(found, PromptLearningConfig) else REFUSED.get(name)
