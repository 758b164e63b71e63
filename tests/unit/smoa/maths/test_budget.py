from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoa.maths.budget import adapter_bytes, rank_bound, trainable_parameters
from tests import reference
from tests.support.layers import adapted_layer, base_layer, base_weight, labels, ranks


@given(data=st.data())
def test_the_budget_counts_what_the_formula_counts(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 500))
    num_blocks = data.draw(st.integers(1, min(out_features, in_features, 255)))
    r = data.draw(st.integers(1, 64))
    expected = reference.parameter_count(out_features, in_features, reference.block_ranks(r, num_blocks))
    assert trainable_parameters(out_features, in_features, r, num_blocks) == expected


def test_the_budget_counts_given_ranks() -> None:
    expected = reference.parameter_count(11, 13, [4, 0, 1])
    assert trainable_parameters(11, 13, 5, 3, ranks=(4, 0, 1)) == expected


@pytest.mark.parametrize(("out_features", "in_features", "num_blocks", "r"), [(24, 20, 2, 4), (11, 13, 3, 7)])
def test_the_rank_bound_is_that_of_full_anchors(out_features: int, in_features: int, num_blocks: int, r: int) -> None:
    layer = adapted_layer(base_layer(out_features, in_features), r=r, num_blocks=num_blocks)
    expected = reference.rank_bound(base_weight(layer), *labels(layer), ranks(layer))
    assert rank_bound(out_features, in_features, r, num_blocks) == expected


def test_the_bytes_of_an_adapter_are_those_of_its_state() -> None:
    layer = adapted_layer(base_layer(17, 10, dtype=torch.float32), r=5, num_blocks=3)
    state = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("base_layer")}
    assert sum(tensor.nbytes for tensor in state.values()) == adapter_bytes(17, 10, r=5, num_blocks=3)
