"""One config object for several adapters.

TRL's DPO, KTO and GRPO trainers copy their start to a second adapter of the same config. Others change it in between.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from smoa import SmoaConfig
from tests.support import tiny_models
from tests.support.layers import Wrapper, smoa_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def copy_as_trl_does(model: Any) -> None:
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("partition", ["spectral", "random"])
def test_the_reference_equals_a_start_trained_on_other_weights(
    partition: Any, tiny_llama: PreTrainedModel, tmp_path: Any
) -> None:
    config = SmoaConfig(r=8, num_blocks=4, target_modules=TARGETS, init_weights=False, partition=partition)
    get_peft_model(tiny_llama, config).save_pretrained(tmp_path)
    other = tiny_models.build("llama")
    with torch.no_grad():
        for parameter in other.parameters():  # as after quantization: another spectrum, so other blocks if computed
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = PeftModel.from_pretrained(other, tmp_path, is_trainable=True).eval()
    copy_as_trl_does(model)
    reference, start = (get_peft_model_state_dict(model, adapter_name=name) for name in ("ref", "default"))
    assert reference.keys() == start.keys()
    assert all(torch.equal(reference[name], start[name]) for name in start)


CHANGES: list[dict[str, Any]] = [
    {"num_blocks": 4},
    {"target_modules": ["k_proj", "v_proj"]},
    {"partition": "contiguous"},
    {"scale": "paper"},
    {"modulation": "none"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_an_adapter_of_a_changed_config_is_that_of_a_config_of_its_own(
    changes: dict[str, Any], tiny_llama: PreTrainedModel
) -> None:
    config = SmoaConfig(r=8, target_modules=TARGETS)
    model = get_peft_model(tiny_llama, config)
    for name, value in changes.items():
        setattr(config, name, value)
    model.add_adapter("other", config)
    alone = get_peft_model(tiny_models.build("llama"), SmoaConfig(**{"r": 8, "target_modules": TARGETS} | changes))
    expected = get_peft_model_state_dict(alone)
    state = get_peft_model_state_dict(model, adapter_name="other")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state if "smoa_A" not in key)


def test_a_twin_on_the_meta_device_gets_its_blocks_with_the_weights() -> None:
    with torch.device("meta"):
        base = Wrapper(nn.Linear(8, 8))
    config = SmoaConfig(r=4, target_modules=["layer"])
    model = get_peft_model(base, config)
    model.add_adapter("twin", config)
    layer = model.base_model.model.layer
    layer.base_layer.weight = nn.Parameter(torch.randn(8, 8))
    assert torch.equal(layer.blocks("twin").row_labels, layer.blocks("default").row_labels)


@pytest.mark.parametrize("changes", [{"alpha": 40.0}, {"target_modules": {"k_proj"}}], ids=str)
def test_a_config_that_was_changed_is_saved_as_the_adapter_was_made(
    changes: dict[str, Any], tiny_llama: PreTrainedModel, tmp_path: Any
) -> None:
    config = SmoaConfig(r=8, alpha=16.0, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(tiny_llama, config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.warns(UserWarning, match=rf"changed after .*{next(iter(changes))}="):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    theirs = smoa_layers(loaded)
    assert all(torch.equal(theirs[name].delta("default"), m.delta("default")) for name, m in smoa_layers(model).items())
    assert model.peft_config["default"] is config
