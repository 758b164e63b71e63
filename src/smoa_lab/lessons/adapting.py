"""Gives a base model the adapter of a run's method, with what CorDA needs before training and intruders need after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoa.errors import ConfigError
from smoa_lab.config.methods import METHODS
from smoa_lab.data.tasks import find_task, load_task
from smoa_lab.scoring.forgetting import text_length, whole_text

PASSAGES = 128
"""So many passages of general text show CorDA what to keep."""
REDUCED = "reduced"


def with_adapter(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    adapter: dict[str, Any],
    revision: str | None = None,
) -> Any:
    """The model to train: a PeftModel or, for full fine-tuning, the base itself.

    The adapter's config records ``revision``, the base's branch or commit, so that whoever loads it gets the same base.

    CorDA keeps what the inputs of the layers are on passages of the task ``prose``, its training part.

    Raises:
        ConfigError: CorDA was given no ``target_modules``.
        DataError: the passages cannot be loaded.
    """
    peft_config = METHODS[method].peft_config(adapter)
    if peft_config is None:
        return base
    if method == "corda":
        _measure_inputs(base, tokenizer, peft_config)
    return get_peft_model(base, peft_config, revision=revision)


def after_training(model: Any, method: str) -> None:
    """Change a trained model as its method says: ``lora-reduced`` scales its intruder dimensions down (2410.21228)."""
    reduce = METHODS[method].after
    if reduce is not None:
        _replace_factors(model, reduce)


def _measure_inputs(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: PeftConfig) -> None:
    if not isinstance(wanted, LoraConfig) or not wanted.target_modules:
        raise ConfigError("adapter.target_modules: is missing; corda measures these layers before it starts")
    texts = [whole_text(record) for record in load_task("prose", find_task("prose")).train[:PASSAGES]]
    preprocess_corda(base, wanted, run_model=lambda: _read(base, tokenizer, texts))


@torch.no_grad()
def _read(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """One at a time, as PEFT's hooks want it, and without the output layer."""
    length = text_length(base.config)
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        base.base_model(input_ids=tokens["input_ids"].to(base.device))


def _replace_factors(model: PeftModel, reduce: Any) -> None:
    """PEFT puts the reduced factors into a second adapter; here they replace the trained ones."""
    trained = model.active_adapter
    reduce(model, old_adapter_name=trained, new_adapter_name=REDUCED, logging_sink=None)
    layers: Iterable[Any] = (module for module in model.modules() if isinstance(module, LoraLayer))
    for factors in (factors for layer in layers for factors in (layer.lora_A, layer.lora_B)):
        factors[trained].weight.data.copy_(factors[REDUCED].weight.data)
    model.set_adapter(trained)
    model.delete_adapter(REDUCED)
