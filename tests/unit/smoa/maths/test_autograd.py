"""What training sees: finite differences, every parameter reached, and the descent that follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoa.layers.layer import SmoaLayer
from tests import reference
from tests.support.layers import adapted_layer, add_adapter, base_layer, clone_leaf, factors, oracle_delta, ranks

MODULATIONS = ["hadamard", "none"]


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_fresh_adapter_moves_B_first(modulation: str) -> None:
    layer = adapted_layer(base_layer(8, 6), trained=False, r=4, num_blocks=2, modulation=modulation)
    layer(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    A, B = factors(layer)
    assert (A.grad == 0).all()
    assert (B.grad != 0).all()


def distance_after_training(layer: SmoaLayer, target: Tensor, x: Tensor) -> tuple[float, float]:
    optimizer = torch.optim.Adam(factors(layer), lr=3e-2)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_training_recovers_another_adapters_output(modulation: str) -> None:
    settings = {"r": 4, "num_blocks": 2, "modulation": modulation}
    base = base_layer(8, 6)
    x = torch.randn(40, 6, dtype=torch.float64)
    target = adapted_layer(base, **settings)(x).detach()
    first, last = distance_after_training(adapted_layer(base, trained=False, **settings), target, x)
    assert last < 0.05 * first


def test_the_rank_of_a_trained_update_exceeds_the_budget_and_respects_the_bound() -> None:
    layer = adapted_layer(base_layer(24, 20), trained=False, r=4, num_blocks=2)
    x = torch.randn(60, 20, dtype=torch.float64)
    distance_after_training(layer, torch.randn(60, 24, dtype=torch.float64), x)
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default")))
    partition = layer.blocks("default")
    bound = reference.rank_bound(
        layer.get_base_layer().weight.detach(),
        partition.row_labels.tolist(),
        partition.col_labels.tolist(),
        ranks(layer),
    )
    assert 4 < rank <= bound


def test_an_adapter_on_a_weight_of_low_rank_respects_the_bound() -> None:
    base = base_layer(24, 20)
    with torch.no_grad():
        base.weight.copy_(torch.randn(24, 2, dtype=torch.float64) @ torch.randn(2, 20, dtype=torch.float64))
    layer = adapted_layer(base, r=4, num_blocks=2)
    assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) == 8


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_two_adapters_get_their_own_gradients(modulation: str) -> None:
    layer = adapted_layer(base_layer(8, 6), r=4, num_blocks=2, modulation=modulation)
    add_adapter(layer, "other", r=2, num_blocks=3)
    x, gradient = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    layer(x).backward(gradient)
    for name in ("default", "other"):
        A, B = (clone_leaf(factor) for factor in factors(layer, name))
        (x @ oracle_delta(layer, name, A=A, B=B).T).backward(gradient)
        torch.testing.assert_close(factors(layer, name)[0].grad, A.grad)
        torch.testing.assert_close(factors(layer, name)[1].grad, B.grad)
