from __future__ import annotations

import pytest
import torch

from smoa.maths.kernels.loops import loop_backward, loop_forward
from tests import reference
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem


@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
@torch.no_grad()
def test_the_output_is_that_of_the_oracles_update(out_features: int, in_features: int, ranks: tuple[int, ...]) -> None:
    case = problem(out_features, in_features, ranks)
    scale = [1.0 + k for k in range(len(ranks))]
    x = torch.randn(5, in_features, dtype=torch.float64)
    found = loop_forward(case.factors(0.5, scale), x, case.weight)
    assert_close(found, x @ case.oracle("hadamard", [0.5 * s for s in scale]).T)


@pytest.mark.parametrize("needs_x", [False, True], ids=["", "x"])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_gradients_are_the_oracles(out_features: int, in_features: int, ranks: tuple[int, ...], needs_x: bool) -> None:
    case = problem(out_features, in_features, ranks)
    scale = [1.0 + k for k in range(len(ranks))]
    x = torch.randn(5, in_features, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, out_features, dtype=torch.float64)
    y = x @ case.oracle("hadamard", [0.5 * s for s in scale]).T
    expected = torch.autograd.grad(y, (x, case.A, case.B), g)
    with torch.no_grad():
        grad_x, *of_factors = loop_backward(case.factors(0.5, scale), g, x, case.weight, needs_x)
    if needs_x:
        assert_close(grad_x, expected[0])
    else:
        assert grad_x.numel() == 0
    for own, oracles in zip(of_factors, expected[1:], strict=True):
        assert_close(own, oracles)


@torch.no_grad()
def test_padding_gets_no_gradient() -> None:
    case = problem(11, 13, (2, 2, 2))
    in_A, in_B = reference.real_entries(11, 13, case.ranks)
    x, g = torch.randn(5, 13, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    _, grad_A, grad_B = loop_backward(case.factors(), g, x, case.weight, False)
    assert (grad_A[~in_A] == 0).all()
    assert (grad_B[~in_B] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_every_result_in_the_dtype_of_its_operand(dtype: torch.dtype) -> None:
    case = problem(11, 13, (1, 4, 2))
    single = case._replace(A=case.A.detach().float(), B=case.B.detach().float(), weight=case.weight.to(dtype))
    x, g = torch.randn(5, 13).to(dtype), torch.randn(5, 11).to(dtype)
    y = loop_forward(single.factors(0.5), x, single.weight)
    grad_x, grad_A, grad_B = loop_backward(single.factors(0.5), g, x, single.weight, True)
    assert [tensor.dtype for tensor in (y, grad_x, grad_A, grad_B)] == [dtype, dtype, torch.float32, torch.float32]
    delta = single.double().oracle("hadamard", 0.5)
    assert_close(y, x.double() @ delta.T)
    assert_close(grad_x, g.double() @ delta)
