"""A layer's state, output and gradients are the oracle's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from smoa.layers.layer import SmoaLayer
from tests import reference
from tests.support.adapted_models import adapted
from tests.support.layers import (
    SHAPES,
    adapted_layer,
    base_layer,
    base_weight,
    factors,
    labels,
    oracle_delta,
    smoa_layers,
)
from tests.support.tiny_mixtures import experts_of, wrappers
from tests.support.tolerance import assert_close

MODULATIONS = ["hadamard", "none"]


@pytest.mark.parametrize(
    ("partition", "modulation", "conv1d"),
    [
        ("spectral", "hadamard", False),
        ("spectral", "none", True),
        ("contiguous", "hadamard", True),
        ("random", "none", False),
    ],
)
@pytest.mark.parametrize(("out_features", "in_features", "num_blocks"), SHAPES)
def test_delta_output_and_gradients_are_the_oracles(
    out_features: int, in_features: int, num_blocks: int, conv1d: bool, partition: str, modulation: str
) -> None:
    layer = adapted_layer(
        base_layer(out_features, in_features, conv1d=conv1d),
        r=2 * num_blocks + 1,
        num_blocks=num_blocks,
        alpha=5.0,
        partition=partition,
        modulation=modulation,
    )
    x = torch.randn(4, in_features, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(4, out_features, dtype=torch.float64)
    A, B = factors(layer)
    y = layer(x)
    actual = torch.autograd.grad(y, (x, A, B), gradient)
    if partition == "spectral":
        assert labels(layer) == reference.spectral_labels(base_weight(layer), num_blocks)
    assert_close(layer.branch_output(x, "default"), x @ oracle_delta(layer).T)

    delta = oracle_delta(layer, A=A, B=B)
    expected_y = reference.forward(x, base_weight(layer), layer.get_base_layer().bias.detach(), [delta])
    expected = torch.autograd.grad(expected_y, (x, A, B), gradient)

    own_delta = layer.get_delta_weight("default")
    assert_close(own_delta.T if conv1d else own_delta, delta)
    assert_close(y, expected_y)
    for own, oracles in zip(actual, expected, strict=True):
        assert_close(own, oracles)


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


def test_the_state_is_two_compact_factors_a_byte_per_coordinate_and_a_scale_per_block() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3)
    state = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("base_layer")}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == {
        "smoa_A.default.weight": ((6, 5), torch.float64),
        "smoa_B.default.weight": ((4, 6), torch.float64),
        "smoa_row_labels.default": ((11,), torch.uint8),
        "smoa_col_labels.default": ((13,), torch.uint8),
        "smoa_block_scale.default": ((3,), torch.float32),
    }


def test_nothing_besides_the_state_is_kept_per_layer() -> None:
    layer = adapted_layer(base_layer(40, 30), r=6, num_blocks=3)
    layer(torch.randn(4, 30, dtype=torch.float64)).sum().backward()
    frozen = layer.get_base_layer().weight
    kept = {name for name, buffer in layer.named_buffers() if buffer.numel() >= frozen.numel()}
    attributes = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not kept
    assert all(value.numel() < frozen.numel() for value in attributes)


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
    y = reference.forward(x, base_weight(layer), base.bias.detach(), [oracle_delta(layer, A=A, B=B)], [dropped])
    assert_close(own_y, y)
    for own, oracles in zip(actual, torch.autograd.grad(y, (x, A, B), gradient), strict=True):
        assert_close(own, oracles)


def test_an_adapter_with_A_zero_is_a_no_op_that_learns_by_A() -> None:
    layer = adapted_layer(base_layer(12, 10), trained=False, r=4, num_blocks=2, init_weights="zero_A")
    A, B = factors(layer)
    assert (A == 0).all()
    assert (B != 0).all()
    x = torch.randn(5, 10, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, layer.get_base_layer()(x))
    y.sin().sum().backward()
    assert A.grad is not None
    assert (A.grad != 0).any()
    assert (B.grad == 0).all()


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


def test_a_merged_layer_keeps_one_kth_of_the_weight() -> None:
    layer = adapted_layer(base_layer(40, 40), r=4, num_blocks=4)
    layer.merge()
    kept = sum(entries.numel() for blocks in layer._pristine_blocks["default"].values() for entries in blocks.entries)
    assert kept == 40 * 40 // 4
    layer.unmerge()
    assert not layer._pristine_blocks


def layer(**settings: Any) -> SmoaLayer:
    found = adapted_layer(base_layer(11, 13), r=7, num_blocks=3, **settings)
    assert isinstance(found, SmoaLayer)
    return found


def wrapper(**settings: Any) -> SmoaLayer:
    return wrappers(experts_of("qwen3_moe", dtype=torch.float32, **settings))["down_proj"]


MODULES = pytest.mark.parametrize("make", [layer, wrapper])


def saved(module: nn.Module, part: str) -> torch.Tensor:
    return module.state_dict()[f"smoa_{part}.default"]


@MODULES
def test_a_cast_changes_the_factors_and_not_the_saved_scales(make: Any) -> None:
    module = make(scale="block")
    scales = saved(module, "block_scale").clone()
    assert not torch.equal(scales, scales.half().float())
    module.half().float()
    assert torch.equal(saved(module, "block_scale"), scales)


@MODULES
def test_a_loaded_state_brings_its_blocks(make: Any) -> None:
    module, other = make(partition="random"), make(partition="random")
    assert not torch.equal(saved(module, "row_labels"), saved(other, "row_labels"))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.delta("default"), copy.deepcopy(module).delta("default"))
