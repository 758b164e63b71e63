"""A layer's output and gradients, held against the oracle's."""

import torch
from torch import Tensor

from smoa.layer import SmoaLayer
from tests import oracle
from tests.support.layers import adapted_layer, base_layer, base_weight, clone_leaf, factors, oracle_delta
from tests.support.tolerance import assert_close


def layer_13_to_11(*, conv1d: bool = False, dtype: torch.dtype = torch.float64, **config: object) -> SmoaLayer:
    """A ragged layer: K = 3 divides neither side, r = 7 not by K, alpha is not r."""
    settings = {"r": 7, "num_blocks": 3, "alpha": 4.0} | config
    return adapted_layer(base_layer(11, 13, conv1d=conv1d, dtype=dtype), **settings)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 13, dtype=dtype, requires_grad=True)


def oracle_gradients(layer: SmoaLayer, x: Tensor, gradient: Tensor, *adapters: str) -> list[Tensor]:
    """Output and gradients of x and of every adapter's A and B."""
    names = adapters or ("default",)
    leaves = [clone_leaf(x.double())] + [clone_leaf(f.double()) for name in names for f in factors(layer, name)]
    deltas = [oracle_delta(layer, name, A=leaves[2 * a + 1], B=leaves[2 * a + 2]) for a, name in enumerate(names)]
    bias = layer.get_base_layer().bias
    y = oracle.forward(leaves[0], base_weight(layer).double(), bias.detach().double(), deltas)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.double())]


def own_gradients(layer: SmoaLayer, y: Tensor, x: Tensor, gradient: Tensor, *adapters: str) -> list[Tensor]:
    parameters = [f for name in adapters or ("default",) for f in factors(layer, name)]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], gradient)]


def assert_path(layer: SmoaLayer, y: Tensor, x: Tensor, *adapters: str) -> None:
    """Output and gradients are the oracle's."""
    gradient = torch.randn_like(y)
    expected = oracle_gradients(layer, x, gradient, *adapters)
    for own, oracles in zip(own_gradients(layer, y, x, gradient, *adapters), expected, strict=True):
        assert_close(own, oracles)
