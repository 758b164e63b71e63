from __future__ import annotations

import pytest
import torch

from smoa.maths.scale import MODULATIONS, ScaleKind, block_scale
from smoa.maths.spectrum import make_partition
from tests.support.layers import adapted_layer, base_layer, oracle_output
from tests.support.tolerance import assert_close


def test_the_papers_scale_is_one() -> None:
    weight = torch.randn(11, 13)
    assert block_scale("paper", weight, make_partition(weight, 3)).tolist() == [1, 1, 1]


def test_the_scale_by_layer_gives_the_anchor_unit_rms() -> None:
    weight = 0.02 * torch.randn(11, 13)
    scale = block_scale("layer", weight, make_partition(weight, 3))
    assert scale.tolist() == pytest.approx([1 / weight.square().mean().sqrt().item()] * 3)


def test_the_scale_by_block_gives_every_anchor_unit_rms() -> None:
    weight = 0.02 * torch.randn(11, 13)
    blocks = make_partition(weight, 3)
    scale = block_scale("block", weight, blocks)
    assert len(set(scale.tolist())) == 3
    for entries, c in zip(blocks.of(weight), scale, strict=True):
        assert (c * entries).square().mean().sqrt().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["layer", "block", "lora"])
def test_a_weight_of_zeros_has_a_scale_of_one(kind: str) -> None:
    weight = torch.zeros(6, 6)
    assert block_scale(kind, weight, make_partition(weight, 2)).tolist() == [1, 1]


def test_loras_scale_is_three_times_that_by_block() -> None:
    weight = 0.02 * torch.randn(11, 13)
    blocks = make_partition(weight, 3)
    assert_close(block_scale("lora", weight, blocks), 4 * block_scale("block", weight, blocks))


def test_without_an_anchor_the_scale_is_one() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, modulation="none", scale="block")
    assert layer.block_scale("default").tolist() == [1, 1, 1]


def test_an_anchor_of_noise_has_unit_rms_too() -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, modulation="noise", scale="block")
    blocks = layer.blocks("default")
    noise = MODULATIONS["noise"].anchor(layer.pristine_weight(), blocks)
    assert noise is not None
    for entries, c in zip(blocks.of(noise), layer.block_scale("default"), strict=True):
        assert (c * entries).square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", ["layer", "block", "lora"])
@pytest.mark.parametrize("route", ["fused", "apart"])
def test_a_layer_with_such_a_scale_is_the_oracles(kind: str, route: str) -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, alpha=2.0, scale=kind)
    layer.route = route
    x = torch.randn(5, 13, dtype=torch.float64)
    assert_close(layer(x), oracle_output(layer, x))


@pytest.mark.parametrize("kind", ["layer", "block", "lora"])
def test_an_anchor_near_the_smallest_number_counts_as_zero(kind: ScaleKind) -> None:
    blocks = make_partition(torch.ones(2, 2), 2, "contiguous")
    scale = block_scale(kind, torch.full((2, 2), 1.1754943508222875e-38), blocks)
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", [1e-29, 1e-22, 1e19, 1e37])
@pytest.mark.parametrize("kind", ["layer", "block", "lora"])
def test_the_scale_of_an_anchor_of_any_size_is_exact(kind: ScaleKind, size: float) -> None:
    weight = torch.randn(12, 8)
    blocks = make_partition(weight, 2)
    found, expected = block_scale(kind, weight * size, blocks), block_scale(kind, weight, blocks)
    assert_close(found.double() * size, expected.double(), torch.float32)


def test_an_anchor_beyond_float32_counts_as_one() -> None:
    blocks = make_partition(torch.ones(2, 2), 2, "contiguous")
    assert block_scale("block", torch.full((2, 2), 1e100, dtype=torch.float64), blocks).tolist() == [1.0, 1.0]
