from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoa.maths.blocks import Blocks
from smoa.maths.factors import Factors
from smoa.maths.modulations import MODULATIONS as KINDS
from smoa.maths.spectrum import make_partition
from smoa.maths.update import Update
from tests import reference
from tests.support.tolerance import assert_close

MODULATIONS = ["hadamard", "none"]
# (out_features, in_features, block_ranks): square, tall, wide, ragged, r that K does not divide, unequal, an empty one.
CASES = [
    (12, 12, (2, 2, 2)),
    (17, 10, (2, 1, 1, 1)),
    (9, 16, (3, 3)),
    (11, 13, (1, 4, 2)),
    (8, 8, (3, 0)),
    (7, 6, (1,) * 6),
    (5, 9, (4,)),
]


class Problem(NamedTuple):
    weight: Tensor
    A: Tensor
    B: Tensor
    partition: Blocks
    ranks: tuple[int, ...]

    def smoa(self, modulation: str, scaling: float = 1.0) -> Tensor:
        factors = Factors(self.A, self.B, self.ranks, scaling, torch.ones(sum(self.ranks)), self.partition)
        return Update(factors, KINDS[modulation]).delta(self.weight)  # type: ignore[index]

    def oracle(self, modulation: str, scaling: float = 1.0) -> Tensor:
        row_labels, col_labels = self.partition.row_labels.tolist(), self.partition.col_labels.tolist()
        return reference.delta_weight(
            self.weight, self.A, self.B, row_labels, col_labels, self.ranks, scaling, modulation
        )


def problem(out_features: int, in_features: int, ranks: tuple[int, ...], kind: str = "spectral") -> Problem:
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    A_shape, B_shape = reference.factor_shapes(out_features, in_features, len(ranks), sum(ranks))
    A = torch.randn(A_shape, dtype=torch.float64, requires_grad=True)
    B = torch.randn(B_shape, dtype=torch.float64, requires_grad=True)
    return Problem(weight, A, B, make_partition(weight, len(ranks), kind), ranks)


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("kind", ["spectral", "contiguous", "random"])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_delta_weight_is_the_oracles(
    out_features: int, in_features: int, ranks: tuple[int, ...], kind: str, modulation: str
) -> None:
    case = problem(out_features, in_features, ranks, kind)
    assert_close(case.smoa(modulation, scaling=2.5), case.oracle(modulation, scaling=2.5))


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_gradients_of_delta_weight_are_the_oracles(
    out_features: int, in_features: int, ranks: tuple[int, ...], modulation: str
) -> None:
    case = problem(out_features, in_features, ranks)
    gradient = torch.randn_like(case.weight)
    actual = torch.autograd.grad(case.smoa(modulation, scaling=0.75), (case.A, case.B), gradient)
    expected = torch.autograd.grad(case.oracle(modulation, scaling=0.75), (case.A, case.B), gradient)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_delta_weight_is_the_oracles_whatever_the_sizes(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
    num_blocks = data.draw(st.integers(1, min(out_features, in_features)))
    ranks = tuple(data.draw(st.lists(st.integers(1, 4), min_size=num_blocks, max_size=num_blocks)))
    modulation = data.draw(st.sampled_from(MODULATIONS))
    case = problem(out_features, in_features, ranks)
    assert_close(case.smoa(modulation, scaling=1.5), case.oracle(modulation, scaling=1.5))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_padding_of_ragged_blocks_has_no_effect_and_no_gradient(modulation: str) -> None:
    case = problem(11, 13, (2, 2, 2))
    in_A, in_B = reference.real_entries(11, 13, case.ranks)
    before = case.smoa(modulation)
    with torch.no_grad():
        case.A[~in_A] = 1e6
        case.B[~in_B] = 1e6
    after = case.smoa(modulation)
    after.sum().backward()
    assert torch.equal(before, after)
    assert (case.A.grad[~in_A] == 0).all()
    assert (case.B.grad[~in_B] == 0).all()
    assert (case.A.grad[in_A] != 0).all()
    assert (case.B.grad[in_B] != 0).all()


def test_only_diagonal_blocks_change() -> None:
    case = problem(10, 12, (2, 2, 2))
    same_block = case.partition.row_labels[:, None] == case.partition.col_labels[None, :]
    delta = case.smoa("hadamard")
    assert (delta[~same_block] == 0).all()
    assert (delta[same_block] != 0).all()


def test_one_block_with_modulation_is_hira() -> None:
    case = problem(9, 7, (3,))
    assert_close(case.smoa("hadamard", 0.5), reference.hira_delta_weight(case.weight, case.A, case.B, 0.5))


def test_one_block_without_modulation_is_lora() -> None:
    case = problem(9, 7, (3,))
    assert_close(case.smoa("none", 0.5), reference.lora_delta_weight(case.A, case.B, 0.5))


def test_contiguous_blocks_without_modulation_are_a_block_diagonal_of_small_loras() -> None:
    case = problem(8, 10, (2, 1), "contiguous")
    blocks = [case.B[:4, :2] @ case.A[:2, :5], case.B[:4, 2:] @ case.A[2:, :5]]
    assert_close(case.smoa("none"), torch.block_diag(*blocks))


def test_the_scale_is_applied_once() -> None:
    case = problem(9, 7, (2, 2))
    assert_close(case.smoa("hadamard", 3.0), 3.0 * case.smoa("hadamard", 1.0))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_modulation_lifts_the_rank_above_the_budget_up_to_the_bound(modulation: str) -> None:
    case = problem(48, 40, (2, 2))
    labels = case.partition.row_labels.tolist(), case.partition.col_labels.tolist()
    rank = int(torch.linalg.matrix_rank(case.smoa(modulation)))
    assert rank == reference.rank_bound(case.weight, *labels, case.ranks, modulation)
    assert (rank > 4) == (modulation == "hadamard")


def test_delta_weight_of_half_precision_operands_is_computed_in_float32() -> None:
    case = problem(12, 10, (2, 2))
    half = Problem(*(t.detach().bfloat16() for t in case[:3]), case.partition, case.ranks)
    delta = half.smoa("hadamard")
    expected = Problem(*(t.double() for t in half[:3]), case.partition, case.ranks).oracle("hadamard")
    assert delta.dtype == torch.float32
    assert_close(delta, expected)
