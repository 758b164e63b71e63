from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoa.maths.kernels.plain import plain_branch
from tests.support.gradients import layer_13_to_11, oracle_gradients
from tests.support.layers import ROUTES, Route, oracle_output
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem

MODULATIONS = ["hadamard", "none"]


@pytest.mark.parametrize("anchored", [True, False], ids=["anchor", "none"])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_the_branch_is_the_oracles_with_an_anchor_and_without(
    out_features: int, in_features: int, ranks: tuple[int, ...], anchored: bool
) -> None:
    case = problem(out_features, in_features, ranks)
    scale = [1.0 + k for k in range(len(ranks))]
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    delta = case.oracle("hadamard" if anchored else "none", [0.5 * s for s in scale])
    found = plain_branch(case.factors(0.5, scale), x, case.weight if anchored else None)
    assert_close(found, x @ delta.T)


def test_the_anchor_gets_its_gradient_too() -> None:
    case = problem(7, 6, (2, 1))
    x, gradient = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    leaves = [case.weight.requires_grad_(), case.A, case.B]
    found = torch.autograd.grad(plain_branch(case.factors(0.5), x, case.weight), leaves, gradient)
    for own, oracles in zip(
        found, torch.autograd.grad(x @ case.oracle("hadamard", 0.5).T, leaves, gradient), strict=True
    ):
        assert_close(own, oracles)


def test_it_is_differentiated_twice() -> None:
    case = problem(5, 4, (1, 1))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def branch(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return plain_branch(case._replace(A=A, B=B).factors(), x, case.weight)

    assert torch.autograd.gradgradcheck(branch, (x, case.A, case.B))


def test_the_anchors_dtype_does_not_change_that_of_the_output() -> None:
    case = problem(9, 7, (2, 2))
    x = torch.randn(3, 7)
    found = plain_branch(case.factors(), x, case.weight)
    assert found.dtype == torch.float32
    assert_close(found.double(), x.double() @ case.oracle("hadamard").T, torch.float32)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_func_grad_gives_the_oracles_gradients(modulation: str, route: Route) -> None:
    layer = layer_13_to_11(modulation=modulation, route=route)
    x = torch.randn(5, 13, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if "smoa" in name}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).sum()

    gradients = torch.func.grad(loss)(parameters, x)
    _, _, grad_A, grad_B = oracle_gradients(layer, x, torch.ones(5, 11))
    assert_close(gradients["smoa_A.default.weight"], grad_A)
    assert_close(gradients["smoa_B.default.weight"], grad_B)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_vmap_gives_the_oracles_output(modulation: str) -> None:
    layer = layer_13_to_11(modulation=modulation)
    x = torch.randn(4, 5, 13, dtype=torch.float64)
    assert_close(torch.func.vmap(layer)(x), oracle_output(layer, x))


def test_per_sample_gradients_are_the_oracles() -> None:
    layer = layer_13_to_11()
    x = torch.randn(3, 5, 13, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if "smoa" in name}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = oracle_gradients(layer, x[i], torch.ones(5, 11))
        assert_close(gradients["smoa_A.default.weight"][i], expected[2])
