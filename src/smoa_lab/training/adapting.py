"""Tries the adapter of a run's method without weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel

from smoa.errors import ConfigError, nearest


def check_adapter(empty: PreTrainedModel, wanted: PeftConfig) -> None:
    """Try the adapter on the base model without its weights, so that a mistake is found before they are loaded. Some
    methods look at weights when they start, and are tried with them."""
    _check_names([path for path, _ in empty.named_modules() if path], wanted)
    try:
        trained = count_trained(empty, wanted)
    except RuntimeError:  # of PyTorch: a value of a tensor without data
        return
    if not trained:
        raise ConfigError("adapter: trains nothing; leave inference_mode out, and name layers that the method supports")


def count_trained(empty: PreTrainedModel, wanted: PeftConfig, device: str = "meta") -> int:
    """How many parameters the adapter trains on ``empty``, a model without weights, which gets it on ``device``. Raises
    ConfigError if PEFT refuses the adapter, and PyTorch's RuntimeError if a method reads values on the meta device."""
    peft_config: Any = copy.deepcopy(wanted)  # PEFT writes into it
    if hasattr(peft_config, "init_lora_weights"):
        peft_config.init_lora_weights = True  # the others look at the weights
    peft_config.task_type = None  # what a head needs does not matter
    try:
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")  # they come again with the weights
            model = get_peft_model(empty, peft_config, low_cpu_mem_usage=device == "meta")
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, re.error) as error:
        raise ConfigError(f"adapter: {shorten(str(error), 1000)}") from error
    try:
        PeftConfig.from_peft_type(**peft_config.to_dict())
    except ValueError as error:  # IA³ adds the feed-forward layers that it knows of to some that were named
        raise ConfigError(f"adapter: {error}, as the method completes the keys itself; set these as well") from error
    return int(model.get_nb_trainable_parameters()[0])


def _check_names(paths: Sequence[str], config: PeftConfig) -> None:
    """Raise ConfigError for a name that PEFT would pass over: it only wants one of a list to match."""
    layers = {path.rpartition(".")[2] for path in paths if not path[-1].isdigit()}
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(config, key, None)
        wanted = sorted(wanted) if isinstance(wanted, set) else wanted
        if isinstance(wanted, str) and wanted.isidentifier() and wanted not in paths:
            raise ConfigError(f"adapter.{key}: {wanted!r} would have to match a whole path; write [{wanted}]")
        for name in wanted if isinstance(wanted, list) and key != "exclude_modules" else ():
            if not any(f".{path}".endswith(f".{name}") for path in paths):
                raise ConfigError(f"adapter.{key}: the model has no layer {name!r}{nearest(str(name), layers)}")
