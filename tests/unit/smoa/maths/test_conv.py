"""A convolution with ΔW, and its route under transforms. tests/unit/smoa/layers/test_conv.py has the geometries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smoa.maths.conv import Geometry, convolved
from tests.support.tolerance import assert_close
from tests.support.updates import problem

GEOMETRY = Geometry((2, 2), (1, 2), (1, 0), (1, 1), 2)


def test_the_output_is_the_convolution_with_the_dense_update() -> None:
    given, x = problem(6, 3 * 4, (2, 1, 3)), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    update = given.update("hadamard", 0.7)
    kernel = update.delta(given.weight).view(6, 3, 2, 2)
    expected = F.conv2d(x, kernel, None, (1, 2), (1, 0), (1, 1), 2)
    assert_close(convolved(update, x, given.weight, GEOMETRY), expected)


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
def test_a_transform_of_the_output_takes_the_plain_route(modulation: str) -> None:
    given, x = problem(6, 3 * 4, (2, 1, 3)), torch.randn(3, 2, 6, 4, 5, dtype=torch.float64)
    update = given.update(modulation)
    mapped = torch.func.vmap(lambda one: convolved(update, one, given.weight, GEOMETRY))(x)
    assert_close(mapped, torch.stack([convolved(update, one, given.weight, GEOMETRY) for one in x]))


def test_it_is_differentiated_twice() -> None:
    given, x = problem(6, 3 * 2, (2, 1, 3)), torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def convolution(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        update = given._replace(A=A, B=B).update("hadamard", 0.7)
        return convolved(update, x, given.weight, Geometry((2,), (1,), (0,), (1,), 1), with_base=True)

    assert torch.autograd.gradgradcheck(convolution, (x, given.A, given.B))
