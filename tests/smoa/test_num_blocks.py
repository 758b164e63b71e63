"""K by layer: as `num_blocks_pattern` gives it, and in layers narrower than num_blocks, which take fewer blocks."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from smoa import PartitionError, SmoaConfig
from tests import oracle
from tests.support.layers import assert_close, base_weight, factors, randomise, smoa_layers

RANKS = [(8, 4, None), (7, 3, 9.5), (2, 4, 9.5), (12, 6, None)]
"""(r, num_blocks, alpha): even, a remainder that some blocks get, less than a rank for each block."""


class Heads(nn.Module):
    """A wide layer, heads of one, two and three outputs, and one of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 10)
        self.one = nn.Linear(10, 1)
        self.two = Conv1D(2, 10)
        self.three = nn.Linear(10, 3, bias=False)
        self.back = nn.Linear(1, 10)
        nn.init.normal_(self.two.weight)
        self.double()


SIDES = {"wide": 10, "one": 1, "two": 2, "three": 3, "back": 1}


def heads(**config: Any) -> PeftModel:
    torch.manual_seed(3)
    base = Heads()
    model = get_peft_model(base, SmoaConfig(target_modules=list(SIDES), **config))
    for layer in smoa_layers(model).values():
        randomise(layer)
    return model.eval()


@pytest.mark.parametrize(("r", "num_blocks", "alpha"), RANKS)
def test_a_narrow_layer_has_the_first_of_the_blocks_and_the_oracles_update(
    r: int, num_blocks: int, alpha: float | None
) -> None:
    model = heads(r=r, num_blocks=num_blocks, alpha=alpha)
    scaling = 1.0 if alpha is None else alpha / r
    for name, layer in smoa_layers(model).items():
        K = min(num_blocks, SIDES[name])
        ranks = oracle.block_ranks(r, num_blocks)[:K]
        assert list(layer.adapters["default"].ranks) == ranks
        assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-15)
        weight = base_weight(layer)
        A, B = (factor.detach() for factor in factors(layer))
        scales = [scaling * c for c in layer.decided("default").block_scale.tolist()]
        expected = oracle.delta_weight(weight, A, B, *oracle.spectral_labels(weight, K), ranks, scales)
        assert_close(layer.delta("default"), expected)


def test_targets_that_are_all_narrower_than_num_blocks_take_fewer() -> None:
    config = SmoaConfig(r=22, num_blocks=11, target_modules=list(SIDES))
    model = get_peft_model(Heads(), config)
    layers = smoa_layers(model)
    assert {name: len(layer.adapters["default"].ranks) for name, layer in layers.items()} == SIDES
    assert {*(rank for layer in layers.values() for rank in layer.adapters["default"].ranks)} == {2}
    assert (config.num_blocks, config.num_blocks_pattern) == (11, {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_blocks": 4, "num_blocks_pattern": {"two": 3}}, r"num_blocks=3 must be between 1 and 2"),
        ({"num_blocks": 4, "num_blocks_pattern": {"one|two": 2}}, r"num_blocks=2 must be between 1 and 1"),
    ],
)
def test_blocks_that_can_not_be_taken_fewer_of_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        get_peft_model(Heads(), SmoaConfig(target_modules=list(SIDES), **settings))
