from __future__ import annotations

import pytest
import torch

from smoa.maths.kernels.fused import fused_backward, fused_forward
from tests.support.gradients import assert_layer_is_the_oracles
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
@torch.no_grad()
def test_the_output_is_that_of_the_sum_of_weight_and_update(
    out_features: int, in_features: int, ranks: tuple[int, ...], biased: bool, transposed: bool
) -> None:
    case = problem(out_features, in_features, ranks)
    scale = [1.0 + k for k in range(len(ranks))]
    weight = case.weight.T.contiguous().T if transposed else case.weight
    x = torch.randn(5, in_features, dtype=torch.float64)
    bias = torch.randn(out_features, dtype=torch.float64) if biased else None
    expected = x @ (case.weight + case.oracle("hadamard", [0.5 * s for s in scale])).T + (0 if bias is None else bias)
    assert_close(fused_forward(case.factors(0.5, scale), x, weight, bias), expected)


@pytest.mark.parametrize("needs_x", [False, True], ids=["", "x"])
@pytest.mark.parametrize("needs_factors", [False, True], ids=["", "factors"])
def test_gradients_that_are_needed_are_the_oracles_and_others_are_empty(needs_x: bool, needs_factors: bool) -> None:
    case = problem(11, 13, (1, 4, 2))
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 11, dtype=torch.float64)
    expected = torch.autograd.grad(x @ (case.weight + case.oracle("hadamard", 0.5)).T, (x, case.A, case.B), g)
    with torch.no_grad():
        found = fused_backward(case.factors(0.5), g, x, case.weight, needs_x, needs_factors)
    for own, oracles, needed in zip(found, expected, (needs_x, needs_factors, needs_factors), strict=True):
        if needed:
            assert_close(own, oracles)
        else:
            assert own.numel() == 0


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("route", ["fused", "apart"])
@pytest.mark.parametrize("block_ranks", [None, [50, 20, 40], [0, 100, 10]])
def test_ranks_so_large_that_blocks_are_masked_give_the_oracles_values_and_gradients(
    block_ranks: list[int] | None, route: str, conv1d: bool
) -> None:
    settings = {"r": 110, "num_blocks": 3, "block_ranks": block_ranks, "alpha": 11.0}
    assert_layer_is_the_oracles(**settings, route=route, conv1d=conv1d)


@pytest.mark.usefixtures("tiny_chunks")
def test_masked_blocks_in_many_runs_of_rows_give_the_oracles_values_and_gradients() -> None:
    assert_layer_is_the_oracles(r=110, num_blocks=3, alpha=11.0)
