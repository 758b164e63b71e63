"""Convolutions of every geometry and embeddings give the oracle's values and gradients."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from smoa import SmoaConfig
from smoa.conv import Convolution
from smoa.embedding import Embedding
from smoa.kernels.blocks import SCRATCH
from smoa.layer import SmoaLayer
from tests.support.layers import (
    CONVS,
    ROUTES,
    Wrapper,
    adapted_layer,
    assert_close,
    base_weight,
    clone_leaf,
    factors,
    input_of,
    kind_of_layer,
    oracle_delta,
    oracle_of,
    take_route,
)
from tests.support.watch import LiveBytes

SETTINGS = {"r": 7, "num_blocks": 3, "alpha": 4.0}


@pytest.mark.parametrize(("kind", "modulation"), [*((kind, "hadamard") for kind in CONVS), ("conv2d", "none")])
@pytest.mark.parametrize("route", ROUTES)
def test_values_and_gradients_are_the_oracles(kind: str, modulation: str, route: str) -> None:
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


class Convolutions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_step_convolves_once_and_its_backward_only_backward(mode: str) -> None:
    layer = adapted_layer(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), r=4, num_blocks=2)
    with Convolutions() as seen:
        layer(torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
    assert seen.names == ["convolution", "convolution_backward"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_trained_bias_gets_its_gradient(route: str) -> None:
    layer = adapted_layer(kind_of_layer("conv2d"), route=route, **SETTINGS)
    bias = layer.get_base_layer().bias.requires_grad_()
    y = layer(input_of("conv2d"))
    gradient = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, bias, gradient)[0], gradient.sum((0, 2, 3)))


@pytest.mark.parametrize("route", ROUTES)
def test_the_base_layers_hooks_still_run(route: str) -> None:
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


@pytest.mark.usefixtures("multiplies_bfloat16")
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


# embeddings: lookups touch the looked-up rows only


TOKENS = torch.tensor([[3, 16, 0], [5, 3, 12]])


def adapted_table(modulation: str = "hadamard", **options: object) -> SmoaLayer:
    return adapted_layer(nn.Embedding(17, 10, dtype=torch.float64, **options), modulation=modulation, **SETTINGS)


@pytest.mark.parametrize(
    ("modulation", "options"),
    [
        ("hadamard", {}),
        ("none", {"scale_grad_by_freq": True}),
        ("none", {"padding_idx": 3}),  # with M its row is zero
        ("hadamard", {"scale_grad_by_freq": True}),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("twice", [False, True])
def test_values_and_gradients_of_a_lookup_are_the_oracles(
    modulation: str, options: dict[str, Any], route: str, twice: bool
) -> None:
    layer = adapted_table(modulation, **options)
    take_route(route)
    assert isinstance(layer, Embedding)
    A, B = (clone_leaf(factor) for factor in factors(layer))
    table = base_weight(layer) + oracle_delta(layer, A=A, B=B)
    y, expected = layer(TOKENS), torch.nn.functional.embedding(TOKENS, table, **options)
    assert_close(y, expected)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, factors(layer), gradient, create_graph=twice)
    for own, wanted in zip(found, torch.autograd.grad(expected, (A, B), gradient), strict=True):
        assert_close(own, wanted)


def test_the_factors_of_a_table_start_as_large_as_loras_for_the_columns_that_a_token_uses() -> None:
    config = SmoaConfig(r=64, num_blocks=4, target_modules=["layer"])
    layer = get_peft_model(Wrapper(nn.Embedding(17, 200)), config).base_model.model.layer
    assert factors(layer)[0].detach().var().item() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("shape", [(), (2, 3, 2), (2, 0)])
def test_tokens_of_any_shape(shape: tuple[int, ...]) -> None:
    layer = adapted_table()
    tokens = torch.randint(0, 17, shape)
    merged = layer.base_weight() + layer.delta("default")
    assert_close(layer(tokens), merged[tokens])
    if tokens.dim() == 3:
        torch.compiler.reset()
        assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(tokens), merged[tokens])


def test_a_step_makes_nothing_of_the_tables_size() -> None:
    layer = adapted_layer(nn.Embedding(1000, 64), r=8, num_blocks=4)
    SCRATCH.buffers.clear()  # of other tests
    with LiveBytes(*layer.parameters(), *layer.buffers()) as live:
        layer(TOKENS).square().sum().backward()
    assert live.peak < layer.get_base_layer().weight.nbytes / 2  # with the gradient of B, of 250 by 8


def test_dropout_drops_tokens() -> None:
    layer = adapted_layer(nn.Embedding(17, 10, dtype=torch.float64), smoa_dropout=0.5, **SETTINGS).train()
    tokens = torch.full((200,), 3)
    added = layer(tokens) - layer.get_base_layer()(tokens)
    whole = layer.eval()(tokens) - layer.get_base_layer()(tokens)
    dropped = (added == 0).all(1)
    assert 50 < dropped.sum() < 150
    assert_close(added[~dropped], 2 * whole[~dropped])


@pytest.mark.parametrize("scaled", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_a_scaled_embedding_scales_the_update_too(scaled: type[nn.Embedding]) -> None:
    layer = adapted_layer(scaled(17, 10, 0, embed_scale=3.0).double(), **SETTINGS)
    unmerged = layer(TOKENS)
    layer.merge()
    assert_close(layer(TOKENS), unmerged)
