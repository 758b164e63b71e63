"""Special cases of layers/ and maths/ are the published methods: HiRA and LoRA as in PEFT, MELoRA by its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from smoa.layers.layer import SmoaLayer
from tests.support.layers import Wrapper, adapted_layer, base_layer, base_weight, factors
from tests.support.tolerance import assert_close

needs_hira = pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="this PEFT has no HiRA")


def peft_layer(config: PeftConfig, base: nn.Module) -> nn.Module:
    return inject_adapter_in_model(config, Wrapper(base)).layer


def lora_twin(layer: SmoaLayer, alpha: float, conv1d: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    config = LoraConfig(r=layer.r["default"], lora_alpha=alpha, target_modules=["layer"], fan_in_fan_out=conv1d)
    twin = peft_layer(config, layer.get_base_layer())
    own = [twin.lora_A["default"].weight, twin.lora_B["default"].weight]
    return twin, copy_factors(layer, own)


def hira_twin(layer: SmoaLayer, conv1d: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    config = peft.HiraConfig(r=layer.r["default"], target_modules=["layer"], fan_in_fan_out=conv1d)
    twin = peft_layer(config, layer.get_base_layer())
    return twin, copy_factors(layer, [twin.hira_A["default"], twin.hira_B["default"]])


def copy_factors(layer: SmoaLayer, own: list[nn.Parameter]) -> list[nn.Parameter]:
    for source, target in zip(factors(layer), own, strict=True):
        assert source.shape == target.shape
        target.data = source.detach().clone()
    return own


def values_and_gradients(layer: nn.Module, parameters: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", ["lora", pytest.param("peft_hira", marks=needs_hira)])
def test_one_block_is_lora_without_modulation_and_hira_with_it(method: str, conv1d: bool) -> None:
    lora = method == "lora"
    settings: dict[str, Any] = {"alpha": 6.0, "modulation": "none"} if lora else {"scale": "paper"}
    layer = adapted_layer(base_layer(17, 10, conv1d=conv1d), r=4, num_blocks=1, **settings)
    twin, twin_factors = lora_twin(layer, 6.0, conv1d) if lora else hira_twin(layer, conv1d)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    expected = values_and_gradients(twin, twin_factors, x)
    for own, theirs in zip(values_and_gradients(layer, factors(layer), x), expected, strict=True):
        assert_close(own, theirs)
    if lora:  # PEFT's HiRA returns BA
        assert_close(layer.get_delta_weight("default"), twin.get_delta_weight("default"))


def test_modulation_keeps_zero_weights_zero() -> None:
    base = base_layer(8, 10)
    with torch.no_grad():
        base.weight[torch.rand(8, 10) < 0.5] = 0
    layer = adapted_layer(base, r=4, num_blocks=2)
    assert (layer.get_delta_weight("default")[base_weight(layer) == 0] == 0).all()
