from __future__ import annotations

import pytest
import torch

from smoa.maths.kernels import branch
from tests.support.tolerance import assert_close
from tests.support.updates import problem

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("kind", ["spectral", "contiguous"])
def test_either_kernel_gives_the_oracles_values_and_gradients(kind: str) -> None:
    case = problem(17, 10, (2, 1, 1, 1), kind)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 17, dtype=torch.float64)
    delta = case.oracle("hadamard", 0.5)
    expected = torch.autograd.grad(x @ delta.T, (x, case.A, case.B), g)
    with torch.no_grad():
        assert_close(branch.branch_forward(case.factors(0.5), x, case.weight), x @ delta.T)
        found = branch.branch_backward(case.factors(0.5), g, x, case.weight, True)
        kept = branch.delta_blocks(case.factors(0.5), case.weight, torch.float64)
    for own, theirs in zip(found, expected, strict=True):
        assert_close(own, theirs)
    for own, theirs in zip([b for _, stacked in kept for b in stacked], case.partition.of(delta), strict=True):
        assert_close(own, theirs)
