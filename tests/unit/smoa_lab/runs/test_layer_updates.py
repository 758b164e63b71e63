from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from smoa import SmoaConfig
from smoa_lab.runs.layer_updates import adapted_layers, weights_and_updates
from tests.support import tiny_models

OPTIONS = {"r": 3, "target_modules": ["q_proj"]}


CONFIGS = {
    "lora": LoraConfig(**OPTIONS, lora_alpha=7),
    "dora": LoraConfig(**OPTIONS, use_dora=True),
    "smoa": SmoaConfig(r=4, num_blocks=2, target_modules=["q_proj"]),
}
if hasattr(peft, "HiraConfig"):  # from PEFT 0.20 on
    CONFIGS["hira"] = peft.HiraConfig(**OPTIONS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weight_and_update_add_up_to_the_merged_weight(config: PeftConfig) -> None:
    model = get_peft_model(tiny_models.build("llama"), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(std=0.3)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_modules())
    layers = list(adapted_layers(model.base_model.model))
    assert layers
    for path, layer in layers:
        [(name, weight, update)] = weights_and_updates(path, layer, "default")
        assert name == path
        assert torch.equal(weight, layer.get_base_layer().weight)
        assert update.norm() > 0
        torch.testing.assert_close(weight + update, merged[path].weight)
