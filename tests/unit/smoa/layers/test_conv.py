"""Convolutions of every geometry give the oracle's values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smoa.layers.kinds import Convolution
from tests.support.kinds import CONVS, input_of, kind_of_layer, oracle_of
from tests.support.layers import ROUTES, Route, adapted_layer, base_weight, clone_leaf, factors
from tests.support.tolerance import assert_close

SETTINGS = {"r": 7, "num_blocks": 3, "alpha": 4.0}


@pytest.mark.parametrize(("kind", "modulation"), [*((kind, "hadamard") for kind in CONVS), ("conv2d", "none")])
@pytest.mark.parametrize("route", ROUTES)
def test_values_and_gradients_are_the_oracles(kind: str, modulation: str, route: Route) -> None:
    layer = adapted_layer(kind_of_layer(kind), modulation=modulation, route=route, **SETTINGS)
    assert isinstance(layer, Convolution)
    x = input_of(kind).requires_grad_()
    assert_close(layer(x[0]), layer(x)[0])  # one sample without a batch
    A, B = (clone_leaf(factor) for factor in factors(layer))
    leaf = clone_leaf(x)
    expected = oracle_of(layer, leaf, A=A, B=B)
    y = layer(x)
    assert_close(y, expected)
    gradient = torch.randn_like(y)
    own = torch.autograd.grad(y, [x, *factors(layer)], gradient)
    for found, wanted in zip(own, torch.autograd.grad(expected, [leaf, A, B], gradient), strict=True):
        assert_close(found, wanted)


def test_nothing_of_the_weights_size_is_kept_for_the_backward() -> None:
    layer = adapted_layer(nn.Conv2d(64, 64, 3, padding=1), r=4, num_blocks=2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        pointers = {layer.get_base_layer().weight.data_ptr()}
        x = torch.randn(1, 64, 4, 4)
        y = layer(x)
    assert y.requires_grad
    large = [pointer for pointer in kept if pointer not in pointers]
    assert len(large) == len(set(large)) == 3  # x, A and B


@pytest.mark.parametrize("route", ROUTES)
def test_a_trained_bias_gets_its_gradient(route: Route) -> None:
    layer = adapted_layer(kind_of_layer("conv2d"), route=route, **SETTINGS)
    bias = layer.get_base_layer().bias.requires_grad_()
    y = layer(input_of("conv2d"))
    gradient = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, bias, gradient)[0], gradient.sum((0, 2, 3)))


@pytest.mark.parametrize("route", ROUTES)
def test_the_base_layers_hooks_still_run(route: Route) -> None:
    layer = adapted_layer(kind_of_layer("conv1d"), route=route, **SETTINGS)
    called: list[int] = []
    layer.get_base_layer().register_forward_hook(lambda *_: called.append(1))
    layer(input_of("conv1d"))
    assert called == [1]


def test_a_trained_base_weight_gets_the_gradient_of_the_anchor_too() -> None:
    layer = adapted_layer(kind_of_layer("conv1d"), **SETTINGS)
    weight = layer.get_base_layer().weight.requires_grad_()
    x = input_of("conv1d")
    (own,) = torch.autograd.grad(layer(x).sum(), weight)
    leaf = clone_leaf(base_weight(layer))
    base = kind_of_layer("conv1d")
    base.load_state_dict(layer.get_base_layer().state_dict())
    delta = layer.update("default").delta(leaf)
    expected = torch.nn.functional.conv1d(x, (leaf + delta).view(weight.shape), base.bias, base.stride, base.padding)
    assert_close(own.flatten(1), torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_compiled_layer_gives_the_same_values_and_gradients(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    layer = adapted_layer(kind_of_layer("conv2d").to(dtype), **SETTINGS)
    x = input_of("conv2d").to(dtype)
    expected = torch.autograd.grad(layer(x).square().sum(), factors(layer))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for own, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), factors(layer)), expected, strict=True):
        assert_close(own, wanted, dtype)


def test_a_weight_in_channels_last_is_merged_and_restored() -> None:
    layer = adapted_layer(kind_of_layer("conv2d").to(memory_format=torch.channels_last), **SETTINGS)
    weight = layer.get_base_layer().weight
    assert not weight.is_contiguous()
    before, x = weight.clone(), input_of("conv2d")
    unmerged = layer(x)
    layer.merge()
    assert_close(layer(x), unmerged)
    layer.unmerge()
    assert torch.equal(weight, before)
