"""A layer's state, output and gradients are the oracle's."""

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoa.distributed import linear_weight
from tests import oracle
from tests.support.layers import (
    Wrapper,
    adapted_layer,
    assert_close,
    base_layer,
    base_weight,
    factors,
    oracle_delta,
    smoa_layers,
)
from tests.support.tiny import adapted

MODULATIONS = ["hadamard", "none"]


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize(("dtype", "conv1d"), [(torch.float64, True), (torch.bfloat16, False)])
def test_an_untrained_adapter_is_exactly_a_no_op(dtype: torch.dtype, conv1d: bool, modulation: str) -> None:
    base = base_layer(17, 12, conv1d=conv1d, dtype=dtype)
    x = torch.randn(6, 12).to(dtype)
    before = base(x)
    layer = adapted_layer(base, trained=False, num_blocks=4, modulation=modulation)
    assert torch.equal(layer(x), before)
    assert (layer.get_delta_weight("default") == 0).all()
    layer(x).square().sum().backward()
    A, B = factors(layer)
    assert (A.grad == 0).all()
    assert (B.grad != 0).any()


@pytest.mark.parametrize(("conv1d", "modulation"), [(False, "hadamard"), (True, "none")])
def test_values_and_gradients_under_dropout_are_the_oracles(conv1d: bool, modulation: str) -> None:
    base = base_layer(11, 13, conv1d=conv1d)
    layer = adapted_layer(base, r=7, num_blocks=3, alpha=2.0, smoa_dropout=0.3, modulation=modulation).train()
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    A, B = factors(layer)
    gradient = torch.randn(6, 11, dtype=torch.float64)
    torch.manual_seed(3)
    own_y = layer(x)
    actual = torch.autograd.grad(own_y, (x, A, B), gradient)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.3)
    y = oracle.forward(x, base_weight(layer), base.bias.detach(), [oracle_delta(layer, A=A, B=B)], [dropped])
    assert_close(own_y, y)
    for own, oracles in zip(actual, torch.autograd.grad(y, (x, A, B), gradient), strict=True):
        assert_close(own, oracles)


def test_a_layers_scale_can_be_set_and_put_back(tiny_llama: PreTrainedModel) -> None:
    layer = next(iter(smoa_layers(adapted(tiny_llama, alpha=8.0)).values()))
    before = layer.get_delta_weight("default")
    layer.set_scale("other", 3.0)  # of nobody
    layer.set_scale("default", 3.0)
    assert_close(layer.get_delta_weight("default"), 3 * before)
    layer.set_scale("default", 1.0)
    layer.scale_layer(0.5)
    assert_close(layer.get_delta_weight("default"), 0.5 * before)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), before)


# training


# special cases are the published methods


needs_hira = pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="this PEFT has no HiRA")


def values_and_gradients(layer: nn.Module, parameters: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", ["lora", pytest.param("peft_hira", marks=needs_hira)])
def test_one_block_is_lora_without_modulation_and_hira_with_it(method: str, conv1d: bool) -> None:
    lora, given = method == "lora", {"r": 4, "target_modules": ["layer"], "fan_in_fan_out": conv1d}
    settings: dict[str, Any] = {"alpha": 6.0, "modulation": "none"} if lora else {"scale": "paper"}
    layer = adapted_layer(base_layer(17, 10, conv1d=conv1d), r=4, num_blocks=1, **settings)
    config = LoraConfig(**given, lora_alpha=6.0) if lora else peft.HiraConfig(**given)
    twin = inject_adapter_in_model(config, Wrapper(layer.get_base_layer())).layer
    parts = (twin.lora_A, twin.lora_B) if lora else (twin.hira_A, twin.hira_B)
    theirs = [part["default"].weight if lora else part["default"] for part in parts]
    for source, target in zip(factors(layer), theirs, strict=True):
        assert source.shape == target.shape
        target.data = source.detach().clone()
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    pairs = zip(values_and_gradients(layer, factors(layer), x), values_and_gradients(twin, theirs, x), strict=True)
    for own, other in pairs:
        assert_close(own, other)
    if lora:  # PEFT's HiRA returns BA
        assert_close(layer.get_delta_weight("default"), twin.get_delta_weight("default"))


def test_a_factor_that_a_wrapper_gathers_is_not_rounded_by_autocast() -> None:
    wrapped = type("Wrapped", (nn.Linear,), {})(8, 5, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_weight(wrapped), wrapped.weight)
