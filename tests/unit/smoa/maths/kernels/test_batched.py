"""The same values and gradients as block by block, and what a device pays for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoa.maths.blocks import Blocks
from smoa.maths.factors import Factors, factor_shapes
from smoa.maths.kernels.batched import batched_backward, batched_delta, batched_forward
from smoa.maths.kernels.loops import loop_backward, loop_delta, loop_forward
from smoa.maths.spectrum import make_partition
from tests import reference
from tests.support.live_bytes import LiveBytes
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, problem

KINDS = ["spectral", "contiguous"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
@torch.no_grad()
def test_values_and_gradients_are_those_of_the_loops(
    out_features: int, in_features: int, ranks: tuple[int, ...], transposed: bool, kind: str
) -> None:
    case = problem(out_features, in_features, ranks, kind)
    weight = case.weight.T.contiguous().T if transposed else case.weight
    factors = case.factors(0.5, [1.0 + k for k in range(len(ranks))])
    x, g = torch.randn(5, in_features, dtype=torch.float64), torch.randn(5, out_features, dtype=torch.float64)
    assert_close(batched_forward(factors, x, weight), loop_forward(factors, x, weight))
    for needs_x in (False, True):
        expected = loop_backward(factors, g, x, weight, needs_x)
        for own, theirs in zip(batched_backward(factors, g, x, weight, needs_x), expected, strict=True):
            assert_close(own, theirs)
    deltas = zip(batched_delta(factors.wide(), weight, x.dtype), loop_delta(factors, weight, x.dtype), strict=True)
    for (own_run, own), (run, theirs) in deltas:
        assert own_run == run
        assert_close(own, theirs)


@torch.no_grad()
def test_padding_has_no_effect_and_gets_no_gradient() -> None:
    case = problem(11, 13, (2, 2, 2))
    in_A, in_B = reference.real_entries(11, 13, case.ranks)
    x, g = torch.randn(5, 13, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    before = batched_forward(case.factors(), x, case.weight)
    case.A[~in_A], case.B[~in_B] = 1e6, 1e6
    assert torch.equal(batched_forward(case.factors(), x, case.weight), before)
    _, grad_A, grad_B = batched_backward(case.factors(), g, x, case.weight, False)
    assert (grad_A[~in_A] == 0).all()
    assert (grad_B[~in_B] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_rounds_the_update_once(dtype: torch.dtype, kind: str) -> None:
    case = problem(11, 13, (1, 4, 2), kind)
    single = case._replace(A=case.A.detach().float(), B=case.B.detach().float(), weight=case.weight.to(dtype))
    factors, x, g = single.factors(0.5), torch.randn(5, 13).to(dtype), torch.randn(5, 11).to(dtype)
    y, (grad_x, grad_A, grad_B) = (
        batched_forward(factors, x, single.weight),
        batched_backward(factors, g, x, single.weight, True),
    )
    assert [tensor.dtype for tensor in (y, grad_x, grad_A, grad_B)] == [dtype, dtype, torch.float32, torch.float32]
    assert torch.equal(y, loop_forward(factors, x, single.weight))
    assert_close(grad_x, g.double() @ single.double().oracle("hadamard", 0.5))


def large(dtype: torch.dtype, kind: str, num_blocks: int) -> tuple[Factors, Tensor]:
    """A weight beside which the factors and two tokens are small."""
    weight = torch.randn(512, 768).to(dtype)
    ranks = (1,) * num_blocks
    A, B = (torch.randn(shape) for shape in factor_shapes(512, 768, ranks))
    blocks: Blocks = make_partition(weight, num_blocks, kind)  # type: ignore[arg-type]
    return Factors(A, B, ranks, 1.0, torch.ones(num_blocks), blocks), weight


@pytest.mark.parametrize("kind", ["random", "contiguous"])
@pytest.mark.parametrize("num_blocks", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_holds_at_most_three_times_the_diagonal_blocks(dtype: torch.dtype, num_blocks: int, kind: str) -> None:
    factors, weight = large(dtype, kind, num_blocks)
    x, g = torch.randn(2, 768).to(dtype), torch.randn(2, 512).to(dtype)
    known = x, g, weight, factors.A, factors.B, factors.rank_scale, *factors.blocks.orders
    with LiveBytes(*known) as forward:
        batched_forward(factors, x, weight)
    with LiveBytes(*known) as backward:
        batched_backward(factors, g, x, weight, True)
    small = 4 * (factors.A.nbytes + factors.B.nbytes) + 3 * (x.nbytes + g.nbytes)
    for peak in (forward.peak, backward.peak):
        assert weight.nbytes / num_blocks < peak <= 3 / num_blocks * weight.nbytes + small
