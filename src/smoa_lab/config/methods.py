"""The methods that a run can name: every one that the installed PEFT has, SMoA among them, and presets of them; and an
adapter tried without weights."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Annotated, Any

from peft import PeftConfig, get_peft_model
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import StringConstraints
from transformers import PreTrainedModel

import smoa  # noqa: F401  (registers SMoA with PEFT)
from smoa.errors import ConfigError
from smoa_lab.basics.values import nearest

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
        """The key of the adapter in which the number of its parameters is a line; None if there is none."""
        if self.peft_type in BUDGET_KEYS:
            return BUDGET_KEYS[self.peft_type]
        return "r" if hasattr(self.config_class, "r") else None

    def peft_config(self, adapter: dict[str, Any]) -> PeftConfig | None:
        """The PEFT config of a run: the ``adapter:`` block on top of the preset, for a causal language model; raises
        ConfigError if PEFT refuses the block."""
        chosen = self.config_class
        try:
            return None if chosen is None else chosen(**{"task_type": "CAUSAL_LM", **adapter, **self.preset})
        except (ValueError, TypeError, LookupError, ArithmeticError, ImportError) as error:
            raise ConfigError(shorten(str(error), 1000)) from error


PRESETS: dict[str, Method] = {
    "melora": Method("smoa", {"partition": "contiguous", "modulation": "none"}),
    "rslora": Method("lora", {"use_rslora": True}),
    "dora": Method("lora", {"use_dora": True}),
    "pissa": Method("lora", {"init_lora_weights": "pissa"}),
    "full": Method(None),
}
BUDGET_KEYS: dict[str, str | None] = {
    **dict.fromkeys(("boft", "c3a", "lokr", "oft", "osf", "psoft", "randlora", "supertuning")),
    "adalora": "init_r",
    "fourierft": "n_frequency",
    "tinylora": "u",
    "unilora": "theta_d_length",
    "waveft": "n_frequency",
}
"""Where it is another key than ``r``, or none in which the number of parameters is a line."""
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
        near = nearest(name, method_names())
        raise ConfigError(
            f"method: there is no method {name!r}{near}; smoa budget MODEL lora:8 --method all lists them"
        )
    if (reason := _refusal(key, found)) is not None:
        raise ConfigError(f"method: {key} {reason}; choose another method")
    return Method(key)


def moves_base(config: PeftConfig | None) -> bool:
    """Whether the adapter takes a part of the base's weights: switching it off doesn't give the base."""
    return str(getattr(config, "init_lora_weights", None)).lower().startswith(MOVED)


def trains_own_dtype(values: dict[str, Any]) -> bool:
    """Whether a run's values train tensors in the dtype of the base: PEFT makes factors float32, but no copies."""
    given = values.get("adapter")
    adapter = given if isinstance(given, dict) else {}
    copies = bool(adapter.get("modules_to_save")) or adapter.get("bias", "none") != "none"
    return copies or str(values.get("method")).lower() in ("full", "ln_tuning", "adaption_prompt")


def base_lost(config: PeftConfig | None) -> str | None:
    """Why a trained adapter that is switched off doesn't leave the base model; None where it does."""
    if moves_base(config):
        return "moves weights of the base into the adapter"
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"with bias: {bias} trains biases of the base, which stay when the adapter is switched off"
    return None


def method_names() -> list[str]:
    """All methods that a run can name."""
    trained = (name for name, found in _config_classes().items() if _refusal(name, found) is None)
    return sorted({*PRESETS, *trained})


def _config_classes() -> dict[str, type[PeftConfig]]:
    return {kind.value.lower(): found for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _refusal(name: str, found: type[PeftConfig]) -> str | None:
    return PROMPTS if issubclass(found, PromptLearningConfig) else REFUSED.get(name)


def check_adapter(empty: PreTrainedModel, wanted: PeftConfig) -> None:
    """Raise ConfigError unless the adapter can be trained on ``empty``, the base without its weights. Some methods look
    at weights when they start, and are tried with them."""
    try:
        trained = count_trained(empty, wanted)
    except RuntimeError:
        return
    if not trained:
        raise ConfigError("adapter: trains nothing; leave inference_mode out, and name layers that the method supports")


def count_trained(empty: PreTrainedModel, wanted: PeftConfig) -> int:
    """How many parameters the adapter trains on a copy of ``empty``, a model without weights. Raises ConfigError if
    PEFT refuses the adapter, and PyTorch's RuntimeError if a method reads a value of a tensor without data."""
    peft_config: Any = copy.deepcopy(wanted)  # PEFT writes into it
    if hasattr(peft_config, "init_lora_weights"):
        peft_config.init_lora_weights = True  # the others look at the weights
    peft_config.task_type = None  # what a head needs does not matter
    with warnings.catch_warnings(), empty.device:
        warnings.simplefilter("ignore")  # they come again with the weights
        try:
            model = get_peft_model(copy.deepcopy(empty), peft_config, low_cpu_mem_usage=empty.device.type == "meta")
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, ImportError, re.error) as error:
            raise ConfigError(f"adapter: {shorten(str(error), 1000)}") from error
    return int(model.get_nb_trainable_parameters()[0])
