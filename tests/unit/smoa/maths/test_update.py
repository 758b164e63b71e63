"""ΔW by each route and by lookup is the oracle's."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from smoa.maths.kernels.autograd import recomputed
from smoa.maths.kernels.blocks import block_deltas, product_dtype
from smoa.maths.kernels.formed import Lookup
from smoa.maths.update import Update
from tests import reference
from tests.support.tolerance import assert_close
from tests.support.updates import CASES, Problem, problem

pytestmark = pytest.mark.usefixtures("pieces")

MODULATIONS = ["hadamard", "none"]


@pytest.mark.parametrize(
    ("kind", "modulation"), [("spectral", "hadamard"), ("contiguous", "hadamard"), ("random", "none")]
)
@pytest.mark.parametrize(("out_features", "in_features", "ranks"), CASES)
def test_delta_weight_and_its_gradients_are_the_oracles(
    out_features: int, in_features: int, ranks: tuple[int, ...], kind: str, modulation: str
) -> None:
    case = problem(out_features, in_features, ranks, kind)
    own, oracle = (build(modulation, scaling=2.5) for build in (case.smoa, case.oracle))
    assert_close(own, oracle)
    gradient = torch.randn_like(case.weight)
    pairs = (torch.autograd.grad(delta, (case.A, case.B), gradient) for delta in (own, oracle))
    for found, expected in zip(*pairs, strict=True):
        assert_close(found, expected)


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
    expected = half.double().oracle("hadamard")
    assert delta.dtype == torch.float32
    assert_close(delta, expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_routes_are_the_oracles_whatever_the_sizes(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 14))
    num_blocks = data.draw(st.integers(1, min(out_features, in_features)))
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=num_blocks, max_size=num_blocks).filter(any))
    tokens = data.draw(st.integers(0, 5))
    case = problem(
        out_features, in_features, tuple(ranks), data.draw(st.sampled_from(["spectral", "random", "contiguous"]))
    )
    scale = [3.0 + k for k in range(num_blocks)]
    x = torch.randn(tokens, in_features, dtype=torch.float64, requires_grad=True)
    leaves = [x, case.A, case.B]
    update, delta = Update(**vars(case.factors(0.5, scale))), case.oracle("hadamard", [s / 2 for s in scale])
    gradient = torch.randn(tokens, out_features, dtype=torch.float64)

    def check(y: Tensor, expected: Tensor) -> None:
        assert_close(y, expected)
        oracles = torch.autograd.grad(expected, leaves, gradient, retain_graph=True)
        for own, oracle in zip(torch.autograd.grad(y, leaves, gradient), oracles, strict=True):
            assert_close(own, oracle)

    check(update.apply_with_base(x, case.weight, None), x @ (case.weight + delta).T)
    check(update.apply(x, case.weight), x @ delta.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_blocks_are_rounded_to_the_dtype_of_products(dtype: torch.dtype) -> None:
    case = problem(11, 13, (1, 4, 2))
    update, weight = case.update("hadamard"), case.weight.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which does not reach the factors
        found = [block for _, blocks in block_deltas(update, weight, dtype) for block in blocks]
        for own, theirs in zip(found, case.partition.of(update.delta(weight.double())), strict=True):
            assert own.dtype == product_dtype(dtype, "cpu")
            assert_close(own, theirs, dtype)


@pytest.mark.parametrize("needs_x", [False, True], ids=["", "x"])
def test_a_weight_that_is_dequantized_is_read_again_for_the_backward(needs_x: bool) -> None:
    case = problem(11, 13, (1, 4, 2))
    update = case.update("hadamard", 0.5)
    x, g = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 11, dtype=torch.float64)
    inputs = (x, case.A, case.B) if needs_x else (case.A, case.B)
    expected = torch.autograd.grad(update.apply(x, case.weight), inputs, g)
    reads: list[int] = []

    def read() -> torch.Tensor:
        reads.append(1)
        return case.weight

    y = update.apply(x.requires_grad_(needs_x), read)
    for own, theirs in zip(torch.autograd.grad(y, inputs, g), expected, strict=True):
        assert_close(own, theirs)
    assert len(reads) == 2


@pytest.mark.parametrize("modulation", ["hadamard", "none"])
@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_gradients_are_those_of_a_lookup_in_the_whole_update(options: dict[str, Any], modulation: str) -> None:
    given = problem(8, 6, (2, 2))
    update, tokens = given.update(modulation, 0.7), torch.tensor([1, 2, 2, 7, 2, 7])
    leaves = [given.A, given.B, *([given.weight.requires_grad_()] if modulation == "hadamard" else [])]
    route = Lookup(False, options.get("padding_idx"), options.get("scale_grad_by_freq", False))
    rows = recomputed(route, update, tokens, given.weight)
    expected, gradient = F.embedding(tokens, update.delta(given.weight), **options), torch.randn_like(rows)
    assert_close(rows, expected)
    for own, wanted in zip(
        torch.autograd.grad(rows, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        assert_close(own, wanted)
