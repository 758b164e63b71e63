"""Looked-up rows are those of ΔW."""

from __future__ import annotations

import pytest
import torch

from smoa.maths.lookup import looked_up
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem


@pytest.mark.parametrize("modulation", ["hadamard", "none", "noise"])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_their_gradients_are_those_of_the_update(
    case: tuple[int, int, tuple[int, ...]], modulation: str
) -> None:
    given = problem(*case)
    update = given.update(modulation, 0.7)
    tokens = torch.randint(0, case[0], (9,))
    rows, expected = looked_up(update, tokens, given.weight, None, False), update.delta(given.weight)[tokens]
    assert_close(rows, expected)
    gradient = torch.randn_like(rows)
    leaves = (given.A, given.B)
    for own, wanted in zip(
        torch.autograd.grad(rows, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        assert_close(own, wanted)
