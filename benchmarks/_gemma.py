"""Loads Gemma 3 270M with each method, for the benchmarks of whole models."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from _common import GEMMA_TARGETS
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from smoa import SmoaConfig
from smoa_lab.config.run import ModelSection
from smoa_lab.models.base_models import load_base_model

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def gemma(method: str, r: int, num_blocks: int, device: torch.device, base: str = "float32") -> nn.Module:
    """Load the base model, with SMoA, or with LoRA of as many trainable parameters. Adapters start non-zero.

    SMoA's partition is random, because decomposing the weights would not change the cost of a step.

    Args:
        method: "base", "smoa" or "lora".
        r: SMoA's rank.
        num_blocks: SMoA's K.
        device: Where the model is moved.
        base: "float32", or one of QUANTIZATIONS.
    """
    options = {"quantization_config": QUANTIZATIONS[base]} if base in QUANTIZATIONS else {}
    model, _ = load_base_model(ModelSection(name="gemma3-270m", options=options))
    model.to(device)
    if method == "base":
        return model.requires_grad_(False)
    config: PeftConfig = LoraConfig(r=r // num_blocks, target_modules=list(GEMMA_TARGETS), init_lora_weights=False)
    if method == "smoa":
        config = SmoaConfig(
            r=r, num_blocks=num_blocks, target_modules=list(GEMMA_TARGETS), partition="random", init_weights=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)
