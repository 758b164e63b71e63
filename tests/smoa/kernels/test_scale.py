"""Anchors and block scales, in layers and alone."""

import pytest
import torch
from torch import nn

from smoa import PartitionError
from smoa.kernels.scale import ScaleKind, block_scale, rms_of
from smoa.spectrum import make_partition
from tests.support.layers import adapted_layer, assert_close, base_layer, base_weight, oracle_output


@pytest.mark.parametrize("size", [1e-45, 1e-22, 1.0, 1e19, 1e38])
def test_the_rms_is_exact_where_squares_underflow_or_overflow(size: float) -> None:
    weight = (size * torch.randn(50, 40, dtype=torch.float64).clamp(-3, 3)).float()
    assert rms_of(weight) == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = (1000 * torch.randn(5, 7)).to(dtype)  # whose squares overflow it
        assert rms_of(half) == pytest.approx(float(half.double().square().mean().sqrt()), rel=1e-6)


def test_the_scale_by_block_gives_every_anchor_unit_rms_and_loras_four_times_that() -> None:
    weight = 0.02 * torch.randn(11, 13)
    blocks = make_partition(weight, 3)
    scale = block_scale("block", weight, blocks)
    assert len(set(scale.tolist())) == 3
    for entries, c in zip(blocks.of(weight), scale, strict=True):
        assert (c * entries).square().mean().sqrt().item() == pytest.approx(1)
    assert_close(block_scale("lora", weight, blocks), 4 * scale)
    assert block_scale("layer", weight, blocks).tolist() == pytest.approx(
        [1 / weight.square().mean().sqrt().item()] * 3
    )


@pytest.mark.parametrize(("kind", "route"), [("layer", "one product"), ("block", "apart"), ("lora", "one product")])
def test_a_layer_with_such_a_scale_is_the_oracles(kind: str, route: str) -> None:
    layer = adapted_layer(base_layer(11, 13), r=6, num_blocks=3, alpha=2.0, scale=kind, route=route)
    x = torch.randn(5, 13, dtype=torch.float64)
    assert_close(layer(x), oracle_output(layer, x))


@pytest.mark.parametrize("kind", ["layer", "block", "lora"])
def test_an_anchor_near_the_smallest_number_counts_as_zero(kind: ScaleKind) -> None:
    blocks = make_partition(torch.ones(2, 2), 2, "contiguous")
    scale = block_scale(kind, torch.full((2, 2), 1.1754943508222875e-38), blocks)
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", [1e-29, 1e37])
@pytest.mark.parametrize("kind", ["layer", "block", "lora"])
def test_the_scale_of_an_anchor_of_any_size_is_exact(kind: ScaleKind, size: float) -> None:
    weight = torch.randn(12, 8)
    blocks = make_partition(weight, 2)
    found, expected = block_scale(kind, weight * size, blocks), block_scale(kind, weight, blocks)
    assert_close(found.double() * size, expected.double(), torch.float32)


def test_an_anchor_beyond_float32_counts_as_one() -> None:
    blocks = make_partition(torch.ones(2, 2), 2, "contiguous")
    assert block_scale("block", torch.full((2, 2), 1e100, dtype=torch.float64), blocks).tolist() == [1.0, 1.0]


# in adapters


def test_a_random_adapter_is_as_large_with_a_normalized_anchor_as_without() -> None:
    sizes = []
    for scale in ("paper", "layer"):
        torch.manual_seed(0)
        layer = adapted_layer(base_layer(12, 10), trained=False, r=4, num_blocks=2, init_weights=False, scale=scale)
        sizes.append(layer.delta("default").detach().norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_an_anchor_on_the_meta_device_is_normalized_once_weights_are_there() -> None:
    with torch.device("meta"):
        layer = adapted_layer(nn.Linear(6, 6), trained=False, r=2, num_blocks=2, scale="layer")
    with pytest.raises(PartitionError, match="meta device"):
        layer.decided("default")
    layer.base_layer.weight = nn.Parameter(torch.randn(6, 6))
    assert layer.decided("default").block_scale.tolist() == pytest.approx(
        [1 / float(base_weight(layer).square().mean().sqrt())] * 2, rel=1e-5
    )
