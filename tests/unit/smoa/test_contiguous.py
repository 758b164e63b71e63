"""Contiguous blocks are slices: nothing is gathered or scattered, in no route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoa.layers import layer as layers
from smoa.layers.layer import SmoaLayer
from tests.support.gradients import assert_path, layer_13_to_11
from tests.support.launches import gathers
from tests.support.layers import (
    Route,
    base_weight,
    oracle_delta,
)
from tests.support.tolerance import assert_close


def step(layer: SmoaLayer, x: Tensor) -> None:
    layer(x).square().sum().backward()


def contiguous(dtype: torch.dtype = torch.float64, **config: object) -> tuple[SmoaLayer, Tensor]:
    layer = layer_13_to_11(dtype=dtype, **{"partition": "contiguous"} | config)
    return layer, torch.randn(2, 5, 13, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("route", "dtype", "conv1d"),
    [("fused", torch.float64, False), ("apart", torch.float64, True), ("apart", torch.bfloat16, False)],
)
def test_a_training_step_gathers_nothing(
    monkeypatch: pytest.MonkeyPatch, route: Route, dtype: torch.dtype, conv1d: bool
) -> None:
    layer, x = contiguous(dtype, route=route, conv1d=conv1d)
    with gathers(monkeypatch) as found:
        step(layer, x)
    assert not found


@pytest.mark.parametrize(("route", "dtype"), [("fused", torch.float64), ("apart", torch.bfloat16)])
def test_other_blocks_gather(monkeypatch: pytest.MonkeyPatch, route: Route, dtype: torch.dtype) -> None:
    layer, x = contiguous(dtype, route=route, partition="spectral")
    with gathers(monkeypatch) as found:
        step(layer, x)
    assert found


def test_labels_that_happen_to_ascend_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = contiguous(partition="random", route="apart")
    for labels in (layer.smoa_row_labels["default"], layer.smoa_col_labels["default"]):
        labels.copy_(labels.sort().values)
    layer.refresh_orders()
    with gathers(monkeypatch) as found:
        step(layer, x)
    assert not found
    assert_path(layer, layer(x), x)
    layer.load_state_dict({"smoa_row_labels.default": layer.smoa_row_labels["default"].roll(1)}, strict=False)
    assert_path(layer, layer(x), x)


def test_merging_gathers_nothing_and_is_undone_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = contiguous(conv1d=True)
    before, merged = base_weight(layer).clone(), base_weight(layer) + oracle_delta(layer)
    with gathers(monkeypatch) as found:
        layer.merge()
        assert_close(base_weight(layer), merged)
        layer.unmerge()
    assert not found
    assert torch.equal(base_weight(layer), before)


def test_labels_are_compared_when_they_change_and_never_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = contiguous()
    compared: list[int] = []
    original = layers.ascend
    monkeypatch.setattr(layers, "ascend", lambda *labels: compared.append(1) or original(*labels))
    step(layer, x)
    step(layer, x)
    assert not compared
    layer.load_state_dict({}, strict=False)
    step(layer, x)
    step(layer, x)
    assert compared == [1]


def test_transforms_gather_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = contiguous()
    expected = layer(x)
    with gathers(monkeypatch) as found:
        output, pullback = torch.func.vjp(lambda x: layer.branch_output(x, "default"), x.detach())
        pullback(torch.ones_like(output))
    assert not found
    assert_close(output + layer.base_layer(x), expected)


@pytest.mark.parametrize(("route", "dtype"), [("fused", torch.float32), ("apart", torch.bfloat16)])
def test_a_compiled_layer_computes_the_same(route: Route, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    layer, x = contiguous(dtype, route=route)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), layer(x))
    layer.smoa_row_labels["default"].copy_(layer.smoa_row_labels["default"].roll(1))
    layer.refresh_orders()
    assert_close(compiled(x), layer(x))
