"""Looked-up rows are those of ΔW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

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
    rows, expected = update.lookup(tokens, given.weight), update.delta(given.weight)[tokens]
    assert_close(rows, expected)
    gradient = torch.randn_like(rows)
    leaves = (given.A, given.B)
    for own, wanted in zip(
        torch.autograd.grad(rows, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        assert_close(own, wanted)


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_gradients_are_those_of_a_lookup_in_the_whole_update(options: dict[str, Any], modulation: str) -> None:
    given = problem(8, 6, (2, 2))
    update, tokens = given.update(modulation, 0.7), torch.tensor([1, 2, 2, 7, 2, 7])
    leaves = [given.A, given.B, *([given.weight.requires_grad_()] if modulation == "hadamard" else [])]
    rows = update.lookup(tokens, given.weight, options.get("padding_idx"), options.get("scale_grad_by_freq", False))
    expected, gradient = F.embedding(tokens, update.delta(given.weight), **options), torch.randn_like(rows)
    assert_close(rows, expected)
    for own, wanted in zip(
        torch.autograd.grad(rows, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        assert_close(own, wanted)
