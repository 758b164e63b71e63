"""What training does to an adapter, through layers/ and maths/: descent, rank, padding, the same numbers again."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from smoa import SmoaConfig
from smoa.layers.layer import SmoaLayer
from tests import reference
from tests.support import tiny_models
from tests.support.layers import adapted_layer, base_layer, factors, layers_of, randomise
from tests.support.threads import threads
from tests.support.tolerance import assert_close

MODULATIONS = ["hadamard", "none"]


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


def test_padding_stays_zero_through_training_with_momentum_and_decay() -> None:
    layer = adapted_layer(base_layer(11, 13, dtype=torch.float32), r=6, num_blocks=3)
    in_A, in_B = reference.real_entries(11, 13, [2, 2, 2])
    A, B = factors(layer)
    optimizer = torch.optim.AdamW([A, B], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, 13)).square().sum().backward()
        optimizer.step()
    assert (~in_A).any()
    assert (~in_B).any()
    assert (A[~in_A] == 0).all()
    assert (B[~in_B] == 0).all()


def trained(num_threads: int) -> dict[str, Tensor]:
    """The adapter and the losses of three steps on a tiny model."""
    with threads(num_threads):
        return three_steps()


def three_steps() -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = get_peft_model(tiny_models.build("llama"), SmoaConfig(r=6, num_blocks=2, target_modules="all-linear"))
    for layer in layers_of(model):
        randomise(layer, scale=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**tiny_models.batch("llama")).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if ".smoa_" in name}
    return state | {"losses": torch.stack(losses)}


def test_one_thread_gives_the_same_twice_and_two_threads_the_same_within_the_tolerance() -> None:
    one, again, two = trained(1), trained(1), trained(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    for name, tensor in one.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(two[name], tensor), "labels"
        else:
            assert_close(two[name], tensor)
