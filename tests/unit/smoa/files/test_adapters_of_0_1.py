"""Adapters saved by smoa 0.1.0 load to the ΔW that they had, bit for bit.

`tests/data/adapters_0_1` holds a base model, adapters as 0.1.0 wrote them, and the ΔW of each layer as it computed it.
All values are small multiples of powers of two, so that no order of summation changes a bit; where they can't be
(noise), rounding is allowed for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoa import SmoaConfig
from tests.support.layers import smoa_layers
from tests.support.tolerance import assert_close

SAMPLES = Path(__file__).parents[3] / "data" / "adapters_0_1"
CASES = sorted(file.parent.relative_to(SAMPLES).as_posix() for file in SAMPLES.rglob("adapter_config.json"))


class Base(nn.Module):
    """The model that the adapters were saved on."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 22, bias=False)
        self.conv = Conv1D(10, 22)
        self.head = nn.Linear(10, 3)
        self.load_state_dict(load_file(SAMPLES / "base.safetensors"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.wide(self.up(x))))


def deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    layers = smoa_layers(model).items()
    return {name: layer.delta(adapter_name).detach() for name, layer in layers if adapter_name in layer.smoa_A}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_0_1_loads_to_the_same_update(case: str) -> None:
    found = deltas(PeftModel.from_pretrained(Base(), str(SAMPLES / case)))
    expected = load_file(SAMPLES / case / "delta.safetensors")
    assert sorted(found) == sorted(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6 if case == "noise" else 0, atol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_0_1_saved_again_keeps_its_update(case: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(Base(), str(SAMPLES / case))
    model.save_pretrained(tmp_path)
    again = deltas(PeftModel.from_pretrained(Base(), str(tmp_path)))
    for name, delta in deltas(model).items():
        assert torch.equal(again[name], delta)


def test_an_adapter_of_0_1_loads_into_a_fresh_adapter_of_its_config() -> None:
    config = SmoaConfig.from_pretrained(SAMPLES / "normalize_anchor")
    assert config.normalized_alpha
    model = get_peft_model(Base(), config)
    set_peft_model_state_dict(model, load_file(SAMPLES / "normalize_anchor" / "adapter_model.safetensors"))
    expected = load_file(SAMPLES / "normalize_anchor" / "delta.safetensors")
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(model).items())


def test_a_fresh_adapter_of_a_config_of_0_1_is_normalized_once() -> None:
    config = SmoaConfig.from_pretrained(SAMPLES / "normalize_anchor")
    models = [get_peft_model(Base(), one) for one in (config, replace(config, normalized_alpha={}))]
    scales = [smoa_layers(model)["up"].update("default").factors.scale(torch.float32) for model in models]
    assert_close(*scales)


def test_several_adapters_of_0_1_load_beside_each_other() -> None:
    model = PeftModel.from_pretrained(Base(), str(SAMPLES / "several"))
    model.load_adapter(str(SAMPLES / "several" / "second"), "second")
    for name, file in (("default", "delta.safetensors"), ("second", "second/delta.safetensors")):
        expected = load_file(SAMPLES / "several" / file)
        assert all(torch.equal(delta, expected[layer]) for layer, delta in deltas(model, name).items())


def test_biases_of_0_1_are_loaded() -> None:
    model = PeftModel.from_pretrained(Base(), str(SAMPLES / "biases"))
    base = Base()
    assert torch.equal(model.base_model.model.up.base_layer.bias, base.up.bias + 0.25)
    assert torch.equal(model.base_model.model.head.modules_to_save["default"].bias, base.head.bias + 0.25)
