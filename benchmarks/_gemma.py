"""Gemma 3 270M under each method, for the benchmarks of whole models."""

from __future__ import annotations

import warnings

import torch
from _common import GEMMA_TARGETS
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from smoa import SmoaConfig
from smoa.experiments.base_models import BaseModel, load_base_model


def gemma(method: str, r: int, num_blocks: int, device: torch.device) -> nn.Module:
    """The base model, or it under SMoA or under LoRA of as many trainable parameters; adapters start non-zero.

    SMoA's partition is a random one: decomposing the weights would not change what a step costs.
    """
    model, _ = load_base_model(BaseModel("gemma3-270m"))
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
