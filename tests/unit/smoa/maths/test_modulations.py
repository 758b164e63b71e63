from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smoa.maths.scale import MODULATIONS, rms_of
from smoa.maths.spectrum import make_partition
from tests import reference
from tests.support.layers import adapted_layer, base_layer, base_weight, default_dtype, factors, labels, ranks
from tests.support.tolerance import assert_close


def noise_for(weight: Tensor, num_blocks: int = 2) -> Tensor:
    anchor = MODULATIONS["noise"].anchor(weight, make_partition(weight, num_blocks))
    assert anchor is not None
    return anchor


def test_the_papers_anchor_is_the_weight_itself() -> None:
    weight = torch.randn(8, 6)
    assert MODULATIONS["hadamard"].anchor(weight, make_partition(weight, 2)) is weight


def test_without_modulation_there_is_no_anchor() -> None:
    weight = torch.randn(8, 6)
    assert MODULATIONS["none"].anchor(weight, make_partition(weight, 2)) is None


def test_a_modulation_says_whether_it_anchors_and_whether_by_the_weight() -> None:
    weight = torch.randn(8, 6)
    for modulation in MODULATIONS.values():
        anchor = modulation.anchor(weight, make_partition(weight, 2))
        assert modulation.anchors == (anchor is not None)
        assert modulation.by_weight == (anchor is weight)


def test_noise_depends_on_the_labels_and_not_on_the_generator_which_it_leaves_alone() -> None:
    weight = torch.randn(8, 6)
    before = torch.get_rng_state()
    first = noise_for(weight)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(noise_for(weight), first)
    assert not torch.equal(noise_for(weight, num_blocks=3), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    noise = noise_for(torch.randn(8, 6).to(dtype))
    assert (noise.dtype, noise.shape) == (dtype, (8, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_rms_is_that_of_the_formula_and_overflows_in_no_half(dtype: torch.dtype) -> None:
    weight = (1000 * torch.randn(5, 7)).to(dtype)
    entries = weight.double().flatten().tolist()
    assert rms_of(weight) == pytest.approx(math.sqrt(sum(entry**2 for entry in entries) / len(entries)), rel=1e-6)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_a_noise_anchor_gives_the_oracles_output_and_gradients_with_noise_for_the_weight(conv1d: bool) -> None:
    layer = adapted_layer(
        base_layer(17, 10, conv1d=conv1d), r=5, alpha=3.0, num_blocks=3, modulation="noise", scale="paper"
    )
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    A, B = factors(layer)
    twins = [tensor.detach().clone().requires_grad_() for tensor in (x, A, B)]
    delta = reference.delta_weight(
        layer.update("default").anchor(layer.pristine_weight()).detach(),
        *twins[1:],
        *labels(layer),
        ranks(layer),
        layer.scaling["default"],
    )
    expected = reference.forward(twins[0], base_weight(layer), layer.get_base_layer().bias, [delta])
    y = layer(x)
    assert_close(y, expected)
    found = torch.autograd.grad(y.sin().sum(), [x, A, B])
    for own, oracles in zip(found, torch.autograd.grad(expected.sin().sum(), twins), strict=True):
        assert_close(own, oracles)
    assert_close(layer.delta("default"), delta)


def test_noise_has_the_weights_norm_and_nothing_else_of_it() -> None:
    layer = adapted_layer(base_layer(60, 40), r=4, num_blocks=2, modulation="noise")
    noise, weight = layer.update("default").anchor(layer.pristine_weight()), base_weight(layer)
    assert float(noise.norm() / weight.norm()) == pytest.approx(1, rel=1e-5)
    correlation = float((noise * weight).sum() / (noise.norm() * weight.norm()))
    assert abs(correlation) < 0.1
    assert torch.equal(noise, layer.update("default").anchor(layer.pristine_weight()))


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-22, 1e-17, 1.0, 1e17, 1e19, 1e30, 1e38])
def test_the_rms_is_exact_where_squares_underflow_or_overflow(size: float) -> None:
    weight = (size * torch.randn(50, 40, dtype=torch.float64).clamp(-3, 3)).float()
    assert rms_of(weight) == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-6)


def test_the_rms_of_float64_is_computed_in_float64() -> None:
    assert rms_of(torch.full((3, 3), 1e200, dtype=torch.float64)) == pytest.approx(1e200)


def test_the_noise_does_not_depend_on_the_default_dtype() -> None:
    layer = adapted_layer(base_layer(12, 8, dtype=torch.float32), r=4, num_blocks=2, modulation="noise")
    expected = layer.delta("default")
    with default_dtype(torch.float64):
        assert torch.equal(layer.delta("default"), expected)
