"""Approximates a SMoA adapter, or a run's, by a LoRA for engines that load nothing else.

The best LoRA of rank k keeps the k largest singular values of ΔW (Eckart and Young, 1936). PEFT's `convert_to_lora`
computes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from smoa import ConfigError, UnsupportedVersionError
from smoa_lab.base_models import packaged_name
from smoa_lab.basics.folders import check_place, new_folder
from smoa_lab.merge import plain_base
from smoa_lab.open_run import open_place, with_saved_adapter


@torch.no_grad()
def convert_run(place: str | Path, output: Path, rank: int | float, base: str | None = None) -> dict[str, Any]:
    """Write a LoRA to the new folder ``output``, and say what it loses of the adapter: ``error`` is ‖ΔW − BA‖ / ‖ΔW‖
    over all layers.

    ``rank`` is that of every layer or, as a float in (0, 1], the share of ‖ΔW‖² that each layer keeps at the least rank
    that does. ``options`` are those with which the run loads its base: PEFT's files have no place for them.
    """
    if not hasattr(peft, "convert_to_lora"):
        raise UnsupportedVersionError(f"PEFT {peft.__version__} has no convert_to_lora; install peft 0.19 or later")
    check_place(output, is_new=True)
    opened = open_place(place, base)
    model = with_saved_adapter(plain_base(opened.model)[0], opened.adapter)
    own: Any = model.active_peft_config
    if own.peft_type.value != "SMOA":
        raise ConfigError(f"{opened.adapter}: is a {own.peft_type.value} adapter; only SMoA's are converted to LoRA")
    config, state = peft.convert_to_lora(model, rank)
    section = opened.model.section
    config.base_model_name_or_path = packaged_name(section.name) or section.name
    config.revision, config.task_type = section.options.get("revision"), own.task_type
    config.fan_in_fan_out = any(getattr(layer, "fan_in_fan_out", False) for layer in model.modules())
    update = error = 0.0
    ranks = []
    for name, layer in model.named_modules():
        if (A := state.get(f"{name}.lora_A.weight")) is not None:
            delta, product = layer.get_delta_weight("default").float(), state[f"{name}.lora_B.weight"] @ A
            product = product if product.shape == delta.shape else product.T  # GPT-2's layers are transposed
            update += float(delta.square().sum())
            error += float((delta - product).square().sum())
            ranks.append(len(A))
    with new_folder(output) as folder:
        config.save_pretrained(str(folder))
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME)
        opened.model.tokenizer.save_pretrained(folder)
    return {
        "folder": str(output),
        "rank": max(ranks),
        "parameters": sum(tensor.numel() for key, tensor in state.items() if ".lora_" in key),
        "adapter_parameters": sum(each.numel() for name, each in model.named_parameters() if ".smoa_" in name),
        "error": (error / update) ** 0.5 if update else 0.0,
        "options": {key: value for key, value in section.options.items() if key != "revision"},
    }
