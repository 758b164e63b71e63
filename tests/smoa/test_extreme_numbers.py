"""Edges of the numbers, in layers/, maths/ and tuner/: overflow, denormals, zeros, constants, the largest K and r."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from smoa import MergeError, PartitionError, SmoaConfig
from smoa.layer import SmoaLayer
from tests import oracle
from tests.support.layers import (
    adapted_layer,
    assert_close,
    base_layer,
    base_weight,
    factors,
    labels,
    layers_of,
    oracle_delta,
    oracle_output,
    ranks,
)
from tests.support.tiny import build

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def layer_of(weight: Tensor, **config: object) -> SmoaLayer:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = nn.Parameter(weight.clone())
    return adapted_layer(base, **config)


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_a_merge_that_overflows_float16_is_refused_and_changes_nothing(modulation: str) -> None:
    layer = layer_of(torch.full((6, 8), 200.0, dtype=torch.float16), r=4, modulation=modulation)
    with torch.no_grad():
        for factor in factors(layer):
            factor.fill_(100.0)  # s·BA reaches 2·10⁴ or more, and 65,504 is float16's largest
            factor.mul_(10)
    with pytest.raises(MergeError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, torch.full((6, 8), 200.0, dtype=torch.float16))
    assert not layer.merged


def test_factors_in_float16_whose_product_overflows_it_still_give_a_finite_update() -> None:
    """ΔW is formed in float32: 300 · 300 is beyond float16, times 2⁻¹⁰ it is not."""
    layer = layer_of(torch.full((6, 8), 2.0**-10, dtype=torch.float16), r=2, num_blocks=2)
    with torch.no_grad():
        for factor in factors(layer):
            factor.fill_(300.0)
    assert factors(layer)[0].dtype == torch.float16
    delta = layer.delta("default")
    assert torch.isfinite(delta).all()
    assert_close(delta.double(), oracle_delta(layer), dtype=torch.float32)


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_zero_weight_is_cut_in_natural_order_and_modulates_to_nothing(dtype: torch.dtype, modulation: str) -> None:
    layer = layer_of(torch.zeros(7, 5, dtype=dtype), r=2, num_blocks=2, modulation=modulation)
    assert labels(layer) == (oracle.contiguous_labels(7, 2), oracle.contiguous_labels(5, 2))
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y == 0).all() == (modulation == "hadamard")
    assert all(torch.isfinite(factor.grad).all() for factor in factors(layer))
    assert all((factor.grad == 0).all() == (modulation == "hadamard") for factor in factors(layer))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_layer_is_the_oracles_whatever_its_sizes_blocks_ranks_and_dtype(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 20), "m"), data.draw(st.integers(1, 20), "n")
    num_blocks = data.draw(st.integers(1, min(m, n)), "K")
    r = data.draw(st.integers(1, 6 * num_blocks), "r")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    layer = adapted_layer(
        base_layer(m, n, conv1d=data.draw(st.booleans(), "conv1d"), dtype=dtype),
        r=r,
        num_blocks=num_blocks,
        alpha=data.draw(st.floats(0.1, 20), "alpha"),
        partition=data.draw(st.sampled_from(["spectral", "contiguous", "random"]), "partition"),
        modulation=data.draw(st.sampled_from(["hadamard", "none"]), "modulation"),
    )
    assert ranks(layer) == oracle.block_ranks(r, num_blocks)
    x = torch.randn(data.draw(st.integers(1, 70), "tokens"), n, dtype=dtype)
    expected = oracle_output(layer, x)
    # in half precision rounding is in proportion to the largest summand, not to what is left of the sum
    scale = max(1.0, float(expected.abs().max()))
    assert_close(layer(x).double() / scale, expected / scale, dtype=dtype)
    layer.merge(safe_merge=True)
    assert_close(layer(x).double() / scale, expected / scale, dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_merge_is_undone_bit_for_bit_whatever_the_weight_holds(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    numbers = st.sampled_from([0.0, -0.0, 1.0, -3.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny, 6e-8, 1e-3])
    m, n = data.draw(st.integers(2, 6), "m"), data.draw(st.integers(2, 6), "n")
    values = data.draw(st.lists(numbers, min_size=m * n, max_size=m * n), "weight")
    weight = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(m, n)
    layer = layer_of(weight, r=3, num_blocks=2, partition="contiguous")
    layer.merge()
    layer.unmerge()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]  # so that 0 and -0 differ
    assert torch.equal(base_weight(layer).view(bits), weight.view(bits))


@pytest.mark.parametrize(
    ("value", "partition"), [(float("nan"), "spectral"), (float("inf"), "contiguous"), (float("nan"), "random")]
)
def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_layer(value: float, partition: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("first", "second", "third")})
    with torch.no_grad():
        model.second.weight[2, 3] = value
    with pytest.raises(PartitionError, match=r"second: .*NaN or infinite"):
        get_peft_model(model, SmoaConfig(r=2, target_modules=list(model), partition=partition))


@pytest.mark.parametrize("partition", ["spectral", "contiguous"])
def test_an_expert_that_is_not_finite_is_refused(partition: str) -> None:
    model = build("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[3, 0, 0] = float("nan")
    config = SmoaConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], partition=partition)
    with pytest.raises(PartitionError, match=r"experts\.down_proj: .*NaN or infinite"):
        get_peft_model(model, config)


def test_weights_that_come_after_the_adapter_and_are_not_finite_are_refused_at_first_use() -> None:
    with torch.device("meta"):
        layer = adapted_layer(nn.Linear(6, 6), trained=False, r=2, partition="contiguous")
    layer.base_layer.weight = nn.Parameter(torch.full((6, 6), float("nan")))
    with pytest.raises(PartitionError, match="NaN or infinite"):
        layer.blocks("default")


def test_experts_of_which_one_is_broken_are_refused_under_safe_merge_and_stay_as_they_were() -> None:
    model = get_peft_model(build("qwen3_moe"), SmoaConfig(r=2, target_parameters=["experts.down_proj"]))
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.smoa_B["default"].weight[:, -2:] = float("nan")  # of the last one
    before = layer.stored_weight().clone()
    with pytest.raises(MergeError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.stored_weight(), before)
