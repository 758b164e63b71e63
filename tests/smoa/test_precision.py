"""A small update survives half precision and rounded products, in layers/linear.py and layers/kept.py."""

import pytest
import torch

from smoa.layer import SmoaLayer
from tests.support.layers import adapted_layer, base_layer, base_weight, factors, labels, oracle_delta, relative_error

HALVES = [torch.bfloat16, torch.float16]


def layer_of_relative_size(
    dtype: torch.dtype, size: float, *, conv1d: bool = False, factors_in_float32: bool
) -> SmoaLayer:
    """A layer whose delta W is W times entries of rms `size` in its diagonal blocks, with |W| as in real models."""
    base = base_layer(96, 64, conv1d=conv1d, dtype=dtype)
    with torch.no_grad():
        base.weight.normal_(std=0.02)
    layer = adapted_layer(base, r=16, num_blocks=4)
    if factors_in_float32:  # as get_peft_model has it, unless autocast_adapter_dtype=False
        layer.smoa_A.float()
        layer.smoa_B.float()
    row_labels, col_labels = (torch.tensor(side) for side in labels(layer))
    same_block = row_labels[:, None] == col_labels
    delta = (oracle_delta(layer) / base_weight(layer).double())[same_block]
    with torch.no_grad():
        factors(layer)[1].mul_(size / delta.square().mean().sqrt())
    return layer


@pytest.mark.parametrize("factors_in_float32", [True, False], ids=["fp32 factors", "half factors"])
@pytest.mark.parametrize(("size", "conv1d"), [(3e-4, False), (1e-2, True)])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_small_update_survives_half_precision(
    dtype: torch.dtype, size: float, conv1d: bool, factors_in_float32: bool
) -> None:
    layer = layer_of_relative_size(dtype, size, conv1d=conv1d, factors_in_float32=factors_in_float32)
    x = torch.randn(200, 64).to(dtype)
    assert relative_error(layer.branch_output(x, "default"), x.double() @ oracle_delta(layer).T) <= 0.01


@pytest.mark.parametrize("size", [3e-4, 1e-2])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_small_update_survives_autocast(dtype: torch.dtype, size: float) -> None:
    layer = layer_of_relative_size(torch.float32, size, factors_in_float32=True)
    x = torch.randn(200, 64)
    with torch.autocast("cpu", dtype):
        contribution = layer.branch_output(x, "default")
    assert relative_error(contribution, x.double() @ oracle_delta(layer).T) <= 0.01


@pytest.mark.parametrize("dtype", HALVES)
def test_few_tokens_keep_base_and_update_apart(dtype: torch.dtype) -> None:
    layer = layer_of_relative_size(dtype, 1e-3, factors_in_float32=True)
    base = layer.get_base_layer()
    x = torch.randn(1, 64).to(dtype)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            y, plain = layer(x), base(x)
            contribution = layer.branch_output(x, "default")
        assert torch.equal(y, plain + contribution.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_without_modulation_the_scale_itself_is_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    """4 / 3 / 16 in bfloat16 would make every entry of ΔW larger by 0.2 %."""
    settings = {"num_blocks": 4, "modulation": "none", "init_weights": False}
    layer = adapted_layer(base_layer(96, 64, dtype=dtype), r=16, alpha=4 / 3, **settings)
    x = torch.randn(512, layer.in_features).to(dtype)
    exact = x.double() @ layer.delta("default").double().T
    kept = (layer.branch_output(x, "default").double() * exact).sum() / exact.square().sum()
    assert abs(float(kept) - 1) < (5e-4 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(("size", "apart_keeps", "kept"), [(1e-3, 0.7, 0.75), (1e-2, 1.01, 0.98)])
@torch.no_grad()
def test_one_product_keeps_more_of_a_small_update_in_bfloat16_than_the_sum_of_two(
    size: float, apart_keeps: float, kept: float
) -> None:
    layer = layer_of_relative_size(torch.bfloat16, 0.01, factors_in_float32=True)
    base, x = layer.get_base_layer(), torch.randn(2000, 64).bfloat16()
    exact = x.double() @ base_weight(layer).double().T
    factors(layer)[1].mul_(size * exact.norm() / (x.double() @ oracle_delta(layer).T).norm())
    change = x.double() @ oracle_delta(layer).T
    bias = base.bias.double()

    def found(y: torch.Tensor) -> tuple[float, float]:
        """The share of the change that is kept, and the error relative to it."""
        added, error = y.double() - base(x).double(), y.double() - bias - exact - change
        return float((added * change).sum() / change.square().sum()), float(error.norm() / change.norm())

    base.bias.zero_()
    bias = base.bias.double()
    own, apart = found(layer(x)), found(base(x) + layer.branch_output(x, "default"))
    assert kept <= own[0] <= 1.02
    assert apart[0] <= apart_keeps
    assert own[1] < apart[1] * 1.02


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_the_factors_survive_half_precision(dtype: torch.dtype) -> None:
    layer = layer_of_relative_size(dtype, 1e-3, factors_in_float32=True)
    x, gradient = torch.randn(200, 64).to(dtype), torch.randn(200, 96).to(dtype)
    layer(x).backward(gradient)
    A, B = (factor.detach().double().requires_grad_() for factor in factors(layer))
    (x.double() @ oracle_delta(layer, A=A, B=B).T).backward(gradient.double())
    assert relative_error(factors(layer)[0].grad, A.grad) <= 0.01
    assert relative_error(factors(layer)[1].grad, B.grad) <= 0.01
