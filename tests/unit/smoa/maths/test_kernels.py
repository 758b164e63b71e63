"""Large weights are handled in runs of rows, and large ranks are masked: neither may be seen in the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoa.maths.factors import Factors
from smoa.maths.kernels import operators, scratch
from smoa.maths.spectrum import make_partition
from smoa.maths.update import Update
from tests import reference
from tests.support.layers import adapted_layer, base_layer, clone_leaf, factors, oracle_delta, oracle_output
from tests.support.tolerance import assert_close


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 16 rows, the fewest that the kernels take."""
    monkeypatch.setattr(scratch, "CHUNK_ELEMENTS", {"cpu": 1, "other": 1})


def assert_layer_is_the_oracles(dtype: torch.dtype = torch.float64, **config: object) -> None:
    route, conv1d = config.pop("route", "auto"), bool(config.pop("conv1d", False))
    layer = adapted_layer(base_layer(70, 45, conv1d=conv1d, dtype=dtype), **config).train()
    layer.route = route  # type: ignore[assignment]
    x = torch.randn(9, 45, dtype=dtype, requires_grad=True)
    A, B = factors(layer)
    gradient = torch.randn(9, 70, dtype=dtype)
    y = layer(x)
    actual = torch.autograd.grad(y, (x, A, B), gradient)
    leaves = [clone_leaf(t.double()) for t in (x, A, B)]
    delta = oracle_delta(layer, A=leaves[1], B=leaves[2])
    base = layer.get_base_layer()
    weight = base.weight.detach().double()
    expected = reference.forward(leaves[0], weight.T if conv1d else weight, base.bias.detach().double(), [delta])
    assert_close(y, expected)
    for own, oracles in zip(actual, torch.autograd.grad(expected, leaves, gradient.double()), strict=True):
        assert_close(own, oracles)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("route", ["fused", "apart"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_many_runs_of_rows_give_the_oracles_values_and_gradients(num_blocks: int, route: str, conv1d: bool) -> None:
    assert_layer_is_the_oracles(r=7, num_blocks=num_blocks, alpha=3.0, route=route, conv1d=conv1d)


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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_routes_are_the_oracles_whatever_the_sizes(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 14))
    num_blocks = data.draw(st.integers(1, min(out_features, in_features)))
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=num_blocks, max_size=num_blocks).filter(any))
    tokens = data.draw(st.integers(0, 5))
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    partition = make_partition(weight, num_blocks, data.draw(st.sampled_from(["spectral", "random"])))
    A_shape, B_shape = reference.factor_shapes(out_features, in_features, num_blocks, sum(ranks))
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((tokens, in_features), A_shape, B_shape)
    ]
    x, A, B = leaves
    scale = [3.0 + k for k in range(num_blocks)]
    rank_scale = torch.tensor([s for s, rank in zip(scale, ranks, strict=True) for _ in range(rank)])
    update = Update(Factors(A, B, tuple(ranks), 0.5, rank_scale, partition))
    delta = reference.delta_weight(
        weight, A, B, partition.row_labels.tolist(), partition.col_labels.tolist(), ranks, [s / 2 for s in scale]
    )
    gradient = torch.randn(tokens, out_features, dtype=torch.float64)

    def check(y: Tensor, expected: Tensor) -> None:
        assert_close(y, expected)
        oracles = torch.autograd.grad(expected, leaves, gradient, retain_graph=True)
        for own, oracle in zip(torch.autograd.grad(y, leaves, gradient), oracles, strict=True):
            assert_close(own, oracle)

    check(update.apply_with_base(x, weight, None), x @ (weight + delta).T)
    check(update.apply(x, weight), x @ delta.T)


def test_threads_do_not_disturb_each_other() -> None:
    layers = [adapted_layer(base_layer(150, 120), r=8, num_blocks=2) for _ in range(4)]
    inputs = [torch.randn(70, 120, dtype=torch.float64) for _ in layers]

    def repeat(i: int) -> bool:
        with torch.no_grad():
            first = layers[i](inputs[i])
            return all(torch.equal(layers[i](inputs[i]), first) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_outputs_of_two_calls_share_no_memory() -> None:
    layer = adapted_layer(base_layer(30, 20), r=4, num_blocks=2)
    x, other = torch.randn(80, 20, dtype=torch.float64), torch.randn(80, 20, dtype=torch.float64)
    y = layer(x)
    layer(other).sum().backward()
    assert_close(y, oracle_output(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_obey_the_rules_of_pytorchs_checker(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 13, dtype=dtype)
    partition = make_partition(weight, 3)
    A, B = torch.randn(6, 5, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    x = torch.randn(5, 13, dtype=dtype, requires_grad=True)
    fields = operators._fields(Factors(A, B, (2, 2, 2), 1.5, torch.ones(6), partition))
    torch.library.opcheck(torch.ops.smoa.hadamard_branch.default, (*fields, x, weight))
    if dtype == torch.float32:
        torch.library.opcheck(torch.ops.smoa.fused_linear.default, (*fields, x, weight, torch.randn(11)))
