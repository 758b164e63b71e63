"""Saved scales are exact, whatever cast the module went through: for layers and for parameters of experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from smoa.layers.layer import SmoaLayer
from tests.support.layers import adapted_layer, base_layer
from tests.support.tiny_mixtures import experts_of, wrappers


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
