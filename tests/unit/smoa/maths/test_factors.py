from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smoa.maths.factors import factor_shapes, init_factors, split_rank
from tests import reference
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem

cases = pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)


# sizes


@given(r=st.integers(1, 300), num_blocks=st.integers(1, 255))
def test_a_rank_is_split_evenly_with_the_remainder_to_the_first_blocks(r: int, num_blocks: int) -> None:
    assert list(split_rank(r, num_blocks)) == reference.block_ranks(r, num_blocks)


# scale and dtype


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_products_of_factors_are_formed_in_float32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    case = problem(11, 13, (1, 3, 2))
    factors = case._replace(A=case.A.to(dtype), B=case.B.to(dtype)).factors()
    assert (factors.dtype, factors.wide().A.dtype, factors.wide().B.dtype) == (wide, wide, wide)
    assert factors.wide(torch.float64).dtype == torch.float64


def test_wide_factors_hold_the_scale_once() -> None:
    factors = problem(11, 13, (1, 3, 2)).factors(0.5, [2.0, 3.0, 5.0])
    wide = factors.wide()
    assert factors.scale(torch.float64).tolist() == [1.0, 1.5, 1.5, 1.5, 2.5, 2.5]
    assert torch.equal(wide.A, factors.A)
    assert_close(wide.B, factors.B * torch.tensor([1.0, 1.5, 1.5, 1.5, 2.5, 2.5]))
    assert (wide.scaling, wide.scale(torch.float32).tolist()) == (1.0, [1.0] * 6)
    assert_close(wide.wide().B, wide.B)
    assert wide.ranks == factors.ranks
    assert wide.blocks is factors.blocks


# spreading


@cases
def test_the_product_of_spread_factors_is_the_unmodulated_update(
    out_features: int, in_features: int, ranks: tuple[int, ...]
) -> None:
    case = problem(out_features, in_features, ranks)
    scale = [1.0 + k for k in range(len(ranks))]
    wide = case.factors(0.5, scale).wide()
    expected = reference.factor_shapes(out_features, in_features, len(ranks), sum(ranks))
    assert factor_shapes(out_features, in_features, ranks) == expected
    assert_close(wide.spread_B() @ wide.spread_A(), case.oracle("none", [0.5 * s for s in scale]))


# initialization


def initialized(init: Any, sizes: tuple[int, int], ranks: tuple[int, ...], relative_size: float = 0.1) -> list[Tensor]:
    A, B = (torch.full(shape, float("nan"), dtype=torch.float64) for shape in factor_shapes(*sizes, ranks))
    init_factors(A, B, sizes, ranks, init, relative_size)
    return [A, B]


def blocks_of(A: Tensor, B: Tensor, sizes: tuple[int, int], ranks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """A_k and B_k without padding."""
    heights, widths = (reference.block_sizes(size, len(ranks)) for size in sizes)
    starts = [sum(ranks[:k]) for k in range(len(ranks) + 1)]
    runs = [slice(start, stop) for start, stop in pairwise(starts)]
    return [(A[run, :width], B[:height, run]) for height, width, run in zip(heights, widths, runs, strict=True)]


@pytest.mark.parametrize("init", [True, False, "zero_A"])
def test_padding_starts_at_zero(init: Any) -> None:
    A, B = initialized(init, (11, 13), (2, 0, 3))
    in_A, in_B = reference.real_entries(11, 13, (2, 0, 3))
    assert (A[~in_A] == 0).all()
    assert (B[~in_B] == 0).all()
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()


def assert_uniform(entries: Tensor, limit: float) -> None:
    assert entries.abs().max() <= limit
    assert entries.abs().max() > 0.99 * limit
    assert abs(entries.mean()) < 0.03 * limit
    assert abs(entries.std() / limit - 3**-0.5) < 0.03


def test_by_default_A_is_uniform_by_the_width_of_its_block_and_B_zero() -> None:
    sizes, ranks = (30, 401), (40, 10, 30)
    A, B = initialized(True, sizes, ranks)
    assert (B == 0).all()
    for (block_A, _), width in zip(blocks_of(A, B, sizes, ranks), reference.block_sizes(401, 3), strict=True):
        assert_uniform(block_A, width**-0.5)


def test_with_zero_A_it_is_B_that_is_uniform_by_its_blocks_rank() -> None:
    sizes, ranks = (401, 30), (40, 10, 30)
    A, B = initialized("zero_A", sizes, ranks)
    assert (A == 0).all()
    for (_, block_B), rank in zip(blocks_of(A, B, sizes, ranks), ranks, strict=True):
        assert_uniform(block_B, rank**-0.5)


def test_random_factors_give_a_product_of_the_size_asked_for_in_every_block() -> None:
    relative_size = 2.0
    sizes, ranks = (301, 200), (64, 16, 32)
    A, B = initialized(False, sizes, ranks, relative_size)
    for block_A, block_B in blocks_of(A, B, sizes, ranks):
        assert float((block_B @ block_A).square().mean().sqrt()) == pytest.approx(relative_size, rel=0.15)
